"""What a run asks for beside its dials reaches the policy: priority, weight, deadline, guarantee, quota."""

from __future__ import annotations

from pathlib import Path

from orchestrator.control.terms import Terms
from orchestrator.control.world import TrialState
from orchestrator.policies.plan import TrialId
from orchestrator.policies.snapshot import Quota
from tests.unit.orchestrator.control.test_moves import ONE, TWO
from tests.unit.orchestrator.control.worlds import World

T0, T1 = TrialId("t0"), TrialId("t1")


def test_the_terms_of_a_run_are_in_every_view_of_its_trials(tmp_path: Path) -> None:
    deadline = 1e9
    terms = Terms(user="anna", priority=2, weight=3.0, deadline=deadline, protected=True, max_devices=1.0)
    world = World(tmp_path / "r", "fifo", places=True, terms=terms)
    world.attach("slot-0", devices=(ONE,))
    world.attach("slot-1", devices=(TWO,))
    for trial_id in (T0, T1):
        world.controller.submit(trial_id, {})
    snapshot = world.snapshot()
    assert snapshot is not None
    assert snapshot.quotas == (Quota(user="anna", max_devices=1.0),)
    for view in snapshot.trials:
        assert (view.user, view.priority, view.weight, view.is_protected) == ("anna", 2, 3.0, True)
        assert view.deadline_s == deadline - (world.clock.wall_s() - world.clock.now_s())
    world.decide()
    states = [world.trial(trial_id).state for trial_id in (T0, T1)]
    assert states == [TrialState.RUNNING, TrialState.QUEUED], "there are two devices, and the quota is one"
    world.close()


def test_a_protected_trial_is_not_paused_for_another(tmp_path: Path) -> None:
    params = {"thresholds_s": (0.15,)}
    world = World(tmp_path / "r", "tiresias", policy_params=params, places=True, terms=Terms(protected=True))
    worker = world.attach("slot-0", devices=(ONE,))
    world.controller.submit(T0, {})
    world.clock.advance(0.01)
    world.controller.submit(T1, {})
    for _ in range(20):
        world.decide()
        worker.obey()
    assert world.trial(T0).attained_until(world.clock.now_s()) > 0.15
    assert not world.trial(T0).is_leaving
    world.close()
