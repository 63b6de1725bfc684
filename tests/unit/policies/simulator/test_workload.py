from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.simulator import (
    POLLUX_APPLICATIONS,
    Submission,
    TableError,
    helios_like,
    philly_like,
    read_workload,
    write_workload,
)

HEAD = "name,time,application,num_replicas,batch_size"
NAMES = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), min_size=1).filter(
    lambda text: text == text.strip() and not text.startswith("#")
)
JOBS = st.builds(
    Submission,
    name=NAMES,
    time_s=st.floats(0, 1e9),
    application=st.sampled_from(("a", "b")),
    num_replicas=st.integers(1, 1000),
    batch_size=st.integers(1, 2**30),
    user=st.sampled_from(("", "ann")),
    priority=st.integers(0, 9),
    deadline_s=st.none() | st.floats(1e-3, 1e9),
    length=st.floats(1e-3, 1e3),
    stops_at=st.floats(1e-3, 1.0),
)


@given(st.lists(JOBS, min_size=1, max_size=5, unique_by=lambda job: job.name))
def test_a_workload_comes_back_equal(jobs: list[Submission]) -> None:
    workload = tuple(sorted(jobs, key=lambda job: (job.time_s, job.name)))
    assert read_workload(write_workload(workload).splitlines(), "w.csv") == workload


def test_comments_empty_lines_and_the_columns_of_others_are_read() -> None:
    lines = ["# made by hand", HEAD, "", "cifar10-0,107,cifar10,6,2048", "a,5.5,ncf,1,32768"]
    first, second = read_workload(lines, "w.csv", POLLUX_APPLICATIONS)
    assert (first.name, first.time_s, second.num_replicas, second.batch_size) == ("a", 5.5, 6, 2048)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], "w.csv:1: column 'name' is missing"),
        (["name,time"], "w.csv:1: column 'application' is missing; the first line must name name, time"),
        ([HEAD + ",users"], "w.csv:1: unknown column 'users'; allowed: name, .*; did you mean 'user'?"),
        ([HEAD + ",name"], "w.csv:1: column 'name' is named 2 times"),
        ([HEAD], "w.csv: there is no job in it"),
        ([HEAD, "a,1,cifar10,1"], "w.csv:2: 4 cells; allowed: 5"),
        ([HEAD, "a,1,cifar10,1,1", "b,x,cifar10,1,1"], "w.csv:3: time='x'; allowed: a number >= 0"),
        ([HEAD, "a,nan,cifar10,1,1"], "w.csv:2: time='nan'; allowed: a number >= 0"),
        ([HEAD, "a,-1,cifar10,1,1"], "w.csv:2: time='-1'; allowed: a number >= 0"),
        ([HEAD, "a,1,cifar11,1,1"], "w.csv:2: application='cifar11'; allowed: bert, .*; did you mean 'cifar10'?"),
        ([HEAD, "a,1,cifar10,0,1"], "w.csv:2: num_replicas='0'; allowed: a whole number >= 1"),
        ([HEAD, "a,1,cifar10,1.5,1"], "w.csv:2: num_replicas='1.5'; allowed: a whole number >= 1"),
        ([HEAD, "a,1,cifar10,1,"], "w.csv:2: batch_size=''; allowed: a text"),
        ([HEAD, "a,1,ncf,1,1", "a,1,ncf,1,1"], "w.csv:3: name='a'; allowed: a name of its own; line 2 has the same"),
        ([HEAD, 'a,1,"ncf,1,1'], "w.csv:2: not a line of a CSV table"),
        ([HEAD + ",stops_at", "a,1,ncf,1,1,2"], "w.csv:2: stops_at='2'; allowed: a number > 0 and <= 1"),
        ([HEAD, "a" * 99 + ",1,ncf,9" * 1 + "9" * 20 + ",1"], "num_replicas='99999999"),
    ],
)
def test_a_bad_line_is_named_with_column_value_and_what_is_allowed(lines: list[str], text: str) -> None:
    with pytest.raises(TableError, match=text.replace("(", r"\(")):
        read_workload(lines, "w.csv", POLLUX_APPLICATIONS)


def test_made_up_workloads_are_the_same_for_the_same_seed_and_differ_between_seeds() -> None:
    for make in (philly_like, helios_like):
        assert make(POLLUX_APPLICATIONS, seed=3) == make(POLLUX_APPLICATIONS, seed=3)
        assert make(POLLUX_APPLICATIONS, seed=3) != make(POLLUX_APPLICATIONS, seed=4)


def test_a_philly_like_workload_has_the_published_mix() -> None:
    jobs = philly_like(POLLUX_APPLICATIONS, seed=0, num_jobs=4000)
    part = {name: sum(job.application == name for job in jobs) / len(jobs) for name in POLLUX_APPLICATIONS}
    assert part["cifar10"] + part["ncf"] == pytest.approx(0.72, abs=0.03)
    assert part["imagenet"] == pytest.approx(0.02, abs=0.01)
    assert max(job.time_s for job in jobs) < 8 * 3600
    assert all((job.num_replicas, job.batch_size) in POLLUX_APPLICATIONS[job.application].requests for job in jobs)


def test_a_helios_like_workload_is_many_short_jobs_and_a_few_that_hold_most_of_the_time() -> None:
    jobs = helios_like(POLLUX_APPLICATIONS, seed=0, num_jobs=3000)
    assert sum(job.num_replicas == 1 for job in jobs) > len(jobs) / 2
    assert sum(job.stops_at < 1 for job in jobs) / len(jobs) == pytest.approx(0.376, abs=0.04)
    device_s = sorted(POLLUX_APPLICATIONS[job.application].alone_s(1, 1) * job.length for job in jobs)
    assert sum(device_s[-len(jobs) // 10 :]) > 0.6 * sum(device_s)
