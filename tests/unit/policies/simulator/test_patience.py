"""Every simulation ends, or says why it would not."""

from __future__ import annotations

import dataclasses
import math

import pytest

from orchestrator.policies.simulator import Rules, TableError, parse_cluster, read_workload, simulate
from orchestrator.policies.simulator.rows import read_rows
from tests.unit.policies.simulator.worlds import APPLICATIONS, FirstFit, submissions

RULES = Rules(interval_s=10.0, restart_s=5.0, step_spread=0.0)
HEAD = "name,time,application,num_replicas,batch_size"


def stopped(
    policy: object = None, *times: float, rules: Rules = RULES, cluster: str = "1x1", length: float = 1.0, **asked: int
) -> str | None:
    jobs = tuple(dataclasses.replace(job, length=length) for job in submissions(*(times or (0.0,)), **asked))
    policy = policy or FirstFit()
    summary = simulate(policy, jobs, parse_cluster(cluster), applications=APPLICATIONS, rules=rules)  # type: ignore[arg-type]
    assert (summary.num_ended == summary.num_jobs) == (summary.stopped is None) or rules.horizon_s < math.inf
    return summary.stopped


def test_a_job_that_can_never_be_placed_is_named_with_what_it_asks_for() -> None:
    text = stopped(None, 0.0, 5.0, num_replicas=8, batch_size=80)
    assert text is not None
    assert "the policy places none of 2 jobs, job-0 (num_replicas 8, batch_size 80), job-1" in text


def test_jobs_before_one_that_can_never_be_placed_end_as_ever() -> None:
    jobs = (*submissions(0.0), *(dataclasses.replace(job, name="big") for job in submissions(50.0, num_replicas=8)))
    summary = simulate(FirstFit(), jobs, parse_cluster("1x1"), applications=APPLICATIONS, rules=RULES)
    assert (summary.num_ended, summary.num_jobs) == (1, 2)
    assert "big" in str(summary.stopped)


def test_a_job_that_arrives_late_is_waited_for() -> None:
    assert stopped(None, 0.0, 10_000_000.0) is None


def test_a_job_that_would_take_longer_than_anybody_waits() -> None:
    assert "no job ends within 1,000,000 decisions: job-0" in str(stopped(length=1e9))
    assert stopped(length=1000.0) is None


def test_jobs_that_fail_before_their_checkpoint_come_no_further() -> None:
    rules = dataclasses.replace(RULES, mtbf_s=1.0, checkpoint_s=1e6)
    assert "come no further" not in str(stopped(rules=RULES))
    assert "no job comes further in 10,000 decisions" in str(stopped(rules=rules, length=100.0))


def test_a_time_that_a_number_cannot_resolve_is_no_loop() -> None:
    assert "cannot tell times 10 s apart" in str(stopped(None, 1e18))


def test_with_a_horizon_a_job_waits_until_then() -> None:
    assert stopped(rules=dataclasses.replace(RULES, horizon_s=36_000.0), num_replicas=8, batch_size=80) is None


@pytest.mark.parametrize("time", ["1796060376000000000", "1796060376000000", "1796060376000", "1e12"])
def test_a_time_stamp_in_smaller_units_than_seconds_is_refused(time: str) -> None:
    with pytest.raises(TableError, match=r"t.csv:2: time=.*; allowed: seconds, at most 1e\+11; divide"):
        read_workload([HEAD, f"a,{time},toy,1,128"], "t.csv")
    assert read_workload([HEAD, "a,1796060376,toy,1,128"], "t.csv")[0].time_s == 1796060376.0


def test_a_row_that_could_be_a_comment_is_refused_and_not_lost() -> None:
    with pytest.raises(TableError, match=r't.csv:2: begins with .#. .*a name in quotes \("#1"\), or a comment'):
        read_workload([HEAD, "#1,0,toy,1,128"], "t.csv")
    lines = ["# a comment, with commas", HEAD, "# another", "#", '"#1",0,toy,1,128', ""]
    assert [job.name for job in read_workload(lines, "t.csv")] == ["#1"]
    assert [row.line for row in read_rows(["a,b", "# x", "1,2"], "t.csv", ("a", "b"))] == [3]


def test_a_table_with_the_index_of_pandas_says_how_to_write_it_without() -> None:
    with pytest.raises(TableError, match=r"the first column has no name, as pandas writes its index; .*index=False"):
        read_workload([f",{HEAD}", "0,a,0,toy,1,128"], "t.csv")
