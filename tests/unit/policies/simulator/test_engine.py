from __future__ import annotations

import dataclasses
import math

import pytest

from orchestrator.policies import Plan, TrialId
from orchestrator.policies.simulator import (
    Cluster,
    NodeChange,
    NodeEvent,
    Rules,
    Sharing,
    Summary,
    TableError,
    parse_cluster,
    read_events,
    simulate,
)
from orchestrator.policies.snapshot import Quota, Snapshot
from tests.unit.policies.simulator.worlds import ALONE_S, APPLICATIONS, TOY, FirstFit, submissions

EXACT = Rules(interval_s=10.0, restart_s=5.0, step_spread=0.0)


def run(*times: float, cluster: str = "1x1", rules: Rules = EXACT, share: float = 1.0, **asked: int) -> Summary:
    return simulate(
        FirstFit(share=share),
        submissions(*times, **asked),
        parse_cluster(cluster),
        applications=APPLICATIONS,
        rules=rules,
    )


def test_one_job_alone_takes_its_start_and_its_steps() -> None:
    result = run(3.0)
    # decided at 10, ready at 15, then a thousand steps of 0.1 s
    assert result.jobs[0].ended_s == pytest.approx(15.0 + ALONE_S)
    assert result.jct_mean_s == pytest.approx(12.0 + ALONE_S)
    assert result.jobs[0].device_s == pytest.approx(5.0 + ALONE_S)
    assert result.jobs[0].waited_s == pytest.approx(7.0)
    assert result.num_restarts == 0


def test_a_larger_batch_costs_samples_where_the_noise_is_small() -> None:
    result = run(0.0, cluster="1x2", num_replicas=2, batch_size=20)
    # efficiency (10 + 10) / (10 + 20) on the first half, 1010 / 1020 on the second; two workers, ten samples each
    steps = 500 / 2 / (20 / 30) + 500 / 2 / (1010 / 1020)
    assert result.jobs[0].jct_s == pytest.approx(5.0 + steps * (0.1 + 0.1), rel=1e-6)


def test_jobs_wait_for_devices_and_shares_let_them_run_side_by_side() -> None:
    whole = run(0.0, 0.0)
    assert [job.waited_s for job in whole.jobs] == pytest.approx([0.0, 110.0])
    both = run(0.0, 0.0, share=0.5)
    assert [job.jct_s for job in both.jobs] == pytest.approx([5.0 + 2 * ALONE_S] * 2)


def test_who_is_left_alone_is_no_longer_crowded() -> None:
    crowded = dataclasses.replace(
        TOY,
        response=dataclasses.replace(TOY.response, sharing=Sharing(crowding=0.5)),  # type: ignore[type-var]
    )
    jobs = submissions(0.0, 0.0)
    short = (jobs[0], dataclasses.replace(jobs[1], length=0.25))
    result = simulate(FirstFit(share=0.5), short, parse_cluster("1x1"), applications={"toy": crowded}, rules=EXACT)
    beside_s = 0.25 * ALONE_S * 2 / 0.75  # at half a device, slowed by a quarter
    assert result.jobs[1].jct_s == pytest.approx(5.0 + beside_s)
    assert result.jobs[0].jct_s == pytest.approx(5.0 + beside_s + 0.75 * ALONE_S * 2)


def test_the_same_seed_gives_the_same_simulation_and_another_one_another() -> None:
    rules = dataclasses.replace(EXACT, mtbf_s=40.0, step_spread=0.05, seed=1)
    first, second = run(0.0, 1.0, 2.0, rules=rules), run(0.0, 1.0, 2.0, rules=rules)
    assert first == second
    assert first.num_failures > 0
    assert run(0.0, 1.0, 2.0, rules=dataclasses.replace(rules, seed=2)) != first


def test_a_failure_costs_what_was_done_since_the_last_checkpoint_and_a_start() -> None:
    rules = dataclasses.replace(EXACT, mtbf_s=60.0, checkpoint_s=20.0, seed=3)
    result = run(0.0, rules=rules)
    job = result.jobs[0]
    assert job.num_failures > 0
    assert job.jct_s is not None
    assert 5.0 * job.num_failures < job.jct_s - 5.0 - ALONE_S < 25.0 * job.num_failures


def test_a_node_that_leaves_throws_its_jobs_back_and_they_go_on_elsewhere() -> None:
    cluster = dataclasses.replace(
        parse_cluster("2x1"),
        events=(
            NodeEvent(time_s=55.0, node_id="node0000", change=NodeChange.LEAVES),
            NodeEvent(time_s=75.0, node_id="node0000", change=NodeChange.JOINS),
        ),
    )
    result = simulate(FirstFit(), submissions(0.0, 0.0), cluster, applications=APPLICATIONS, rules=EXACT)
    hit, other = result.jobs
    assert (hit.num_failures, other.num_failures) == (1, 0)
    assert hit.num_starts == 2
    assert hit.jct_s == pytest.approx(80.0 + 5.0 + ALONE_S)  # back at 75, decided at 80, all since the start is lost
    assert other.jct_s == pytest.approx(5.0 + ALONE_S)


def test_a_node_that_only_joins_is_absent_before() -> None:
    cluster = Cluster(
        nodes=parse_cluster("1x1").nodes,
        events=(NodeEvent(time_s=95.0, node_id="node0000", change=NodeChange.JOINS),),
    )
    result = simulate(FirstFit(), submissions(0.0), cluster, applications=APPLICATIONS, rules=EXACT)
    assert result.jobs[0].began_s == 100.0


def test_prices_are_paid_for_what_is_held_and_may_change() -> None:
    assert run(0.0, cluster="1x1:t4$36").cost == pytest.approx((5.0 + ALONE_S) / 100)
    cluster = parse_cluster("1x1:t4$36")
    event = NodeEvent(time_s=55.0, node_id="node0000-t4", change=NodeChange.PRICE, price_per_hour=360.0)
    dearer = dataclasses.replace(cluster, events=(event,))
    result = simulate(FirstFit(), submissions(0.0), dearer, applications=APPLICATIONS, rules=EXACT)
    assert result.cost == pytest.approx(55 / 100 + 50 / 10)


def test_a_job_that_stops_early_ends_there() -> None:
    early = (dataclasses.replace(submissions(0.0)[0], stops_at=0.5),)
    result = simulate(FirstFit(), early, parse_cluster("1x1"), applications=APPLICATIONS, rules=EXACT)
    assert result.jobs[0].jct_s == pytest.approx(5.0 + 0.5 * ALONE_S)
    assert result.jobs[0].progress == 0.5


def test_at_the_horizon_what_has_not_ended_is_said_so() -> None:
    result = run(0.0, 0.0, rules=dataclasses.replace(EXACT, horizon_s=120.0))
    assert (result.num_jobs, result.num_ended) == (2, 1)
    assert result.jobs[1].jct_s is None
    assert result.jct_p99_s == pytest.approx(5.0 + ALONE_S)


def test_events_may_lead_to_decisions_at_once() -> None:
    result = run(3.0, 3.0, rules=dataclasses.replace(EXACT, decides_on_events=True, interval_s=1000.0))
    assert [job.ended_s for job in result.jobs] == pytest.approx([8.0 + ALONE_S, 13.0 + 2 * ALONE_S])


def test_the_figures_add_up() -> None:
    result = run(0.0, 0.0, cluster="2x1")
    assert result.makespan_s == pytest.approx(5.0 + ALONE_S)
    assert result.utilisation == pytest.approx(1.0)
    assert result.device_hours == pytest.approx(2 * (5.0 + ALONE_S) / 3600)
    alone_s = TOY.alone_s(1, 1)
    assert result.goodput == pytest.approx(2 * alone_s / (5.0 + ALONE_S))
    assert result.fairness_mean == pytest.approx((5.0 + ALONE_S) / alone_s)
    assert set(result.figures()) >= {"jct_mean_s", "jct_p50_s", "jct_p99_s", "makespan_s", "num_changes"}


def test_spans_cover_what_was_held_and_promises_are_settled() -> None:
    result = run(0.0, 0.0, share=0.5)
    held = sum((span.end_s - span.begin_s) * span.share * len(span.placement) for span in result.spans)
    assert held == pytest.approx(result.device_hours * 3600)
    assert {round(c.realised, 6) for c in result.calibrations if c.time_s > 10.0} == {50.0}


def test_what_jobs_measured_is_known_to_later_ones_unless_told_otherwise() -> None:
    seen: list[bool] = []

    class Watcher(FirstFit):
        def decide(self, snapshot: Snapshot) -> Plan:
            late = [trial for trial in snapshot.trials if trial.trial_id == TrialId("job-1") and not trial.placement]
            seen.extend(bool(trial.fit.cells) for trial in late)
            return super().decide(snapshot)

    for inherits in (True, False):
        seen.clear()
        rules = dataclasses.replace(EXACT, inherits=inherits)
        simulate(Watcher(), submissions(0.0, 50.0), parse_cluster("1x1"), applications=APPLICATIONS, rules=rules)
        assert set(seen) == {inherits}


@pytest.mark.parametrize(
    "text", ["", "4", "x4", "0x4", "4x0", "4x4:A", "4x4@2", "2x2+", "999999x999", "1x1:a@.", "1x1:a@0"]
)
def test_a_cluster_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cluster"):
        parse_cluster(text)


def test_a_cluster_may_have_types_speeds_and_prices() -> None:
    cluster = parse_cluster("2x4:t4+1x8:a100@3.1$2.5")
    assert (cluster.num_devices, cluster.devices_per_node) == (16, 8)
    view = cluster.nodes[-1].views(16)[7]
    assert (view.device_type, view.speed, view.units) == ("a100", 3.1, 16)
    assert view.price_per_s == pytest.approx(2.5 / 3600)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("5,node9,leaves,", "e.csv:2: node='node9'; allowed: a node of the cluster"),
        ("5,node0000,dies,", "e.csv:2: change='dies'; allowed: joins, leaves, price"),
        ("5,node0000,price,", "e.csv:2: price=''"),
        ("x,node0000,leaves,", "e.csv:2: time='x'"),
    ],
)
def test_a_bad_event_is_named(line: str, text: str) -> None:
    with pytest.raises(TableError, match=text):
        read_events(["time,node,change,price", line], "e.csv", parse_cluster("1x1"))


def test_rules_that_cannot_be_are_refused() -> None:
    for name, value in (("interval_s", 0.0), ("mtbf_s", -1.0), ("restart_s", math.inf), ("window_s", math.nan)):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(EXACT, **{name: value})  # type: ignore[arg-type]


def test_a_quota_is_seen_by_the_policy() -> None:
    quotas = (Quota(user="ann", max_devices=1.0),)
    assert run(0.0, rules=dataclasses.replace(EXACT, quotas=quotas)).num_ended == 1
