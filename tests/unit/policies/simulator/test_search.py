from __future__ import annotations

import dataclasses

from orchestrator.policies.simulator import Job, Rules, parse_cluster, simulate
from orchestrator.policies.simulator.search import AshaSearch, SearchSpec, loss_of
from tests.unit.policies.simulator.worlds import APPLICATIONS, FirstFit

SPEC = SearchSpec(application="toy", num_trials=16, max_concurrent=4, max_reports=16, batch_size=10)
RULES = Rules(interval_s=5.0, restart_s=1.0, decides_on_events=True)


def run(spec: SearchSpec, share: float = 0.25) -> tuple[AshaSearch, float]:
    search = AshaSearch(spec)
    result = simulate(
        FirstFit(share=share),
        search.first_submissions(),
        parse_cluster("1x1"),
        applications=APPLICATIONS,
        rules=RULES,
        overseer=search,
    )
    assert result.num_ended == spec.num_trials
    return search, result.makespan_s


def test_the_better_quarter_survives_each_rung_and_the_best_is_chosen() -> None:
    search, _ = run(SPEC)
    assert SPEC.rungs == (1, 4)
    assert len(search.stopped_at) + len(search.done) == SPEC.num_trials
    assert 1 <= len(search.done) < SPEC.num_trials / 2
    assert search.best in search.done
    mean = {
        kind: sum(loss_of(name, 16, SPEC) for name in names) / len(names)
        for kind, names in (("done", search.done), ("stopped", search.stopped_at))
    }
    assert mean["done"] < mean["stopped"]


def test_no_more_trials_run_at_a_time_than_allowed_and_the_same_seed_gives_the_same_search() -> None:
    (first, seconds), (second, again) = run(SPEC), run(SPEC)
    assert (first.done, first.stopped_at, seconds) == (second.done, second.stopped_at, again)
    other, _ = run(dataclasses.replace(SPEC, seed=5))
    assert other.done != first.done


def test_the_outlook_of_a_good_trial_is_better_than_that_of_a_bad_one() -> None:
    outlooks: dict[str, float] = {}

    class Watched(AshaSearch):
        def outlook(self, job: Job) -> tuple[float | None, int | None, float | None]:
            found = super().outlook(job)
            if found[0] is not None and found[2] is not None:
                outlooks[job.submission.name] = found[0]
                assert found[1] is not None
                assert 0 < found[1] <= job.length
            return found

    search = Watched(SPEC)
    simulate(
        FirstFit(share=0.25),
        search.first_submissions(),
        parse_cluster("1x1"),
        applications=APPLICATIONS,
        rules=RULES,
        overseer=search,
    )
    lasted = [outlooks[name] for name in search.done if name in outlooks]
    fell = [outlooks[name] for name in search.stopped_at if name in outlooks]
    assert lasted
    assert sum(lasted) / len(lasted) > sum(fell) / max(1, len(fell))
