"""From telemetry to a plan: folds observations into fits, freezes the snapshot, takes or refuses an answer.

The policy itself is called in between, by the actor, because it may overrun. A refused plan changes nothing: the plan
in force stays, and trials that are new to it are served by fair shares until the policy is sane again.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from orchestrator.control.events import SPARE_REASON, GainRealised, Offered, PlanCommitted, PlanRefused
from orchestrator.control.gain import Pace, efficiency_of
from orchestrator.control.lifecycle import Trial
from orchestrator.control.memory import memory_fields
from orchestrator.control.node_views import node_type_views, waiting_views
from orchestrator.control.orders import Grant
from orchestrator.control.ranking import Outlook
from orchestrator.control.resizing import limits_now
from orchestrator.control.state import RunState
from orchestrator.control.surroundings import completed
from orchestrator.policies.decide.fair_share import FairShare
from orchestrator.policies.invariants import check
from orchestrator.policies.learn.fit import update
from orchestrator.policies.plan import Allocation, Generation, Plan, Settings, TrialId, changed_dials, diff, is_same
from orchestrator.policies.snapshot import Snapshot, TrialView
from orchestrator.share.verification import judge_speed
from orchestrator.telemetry.stretch import Stretch

logger = logging.getLogger(__name__)


class Decider:
    """Makes snapshots and takes plans for one run."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._last_refusal = ""

    def snapshot(self) -> Snapshot | None:
        """The world now, with fits advanced by what was observed since the last call.

        None when no trial runs, unless trials wait and nodes can be asked for.
        """
        state = self._state
        now_s = state.clock.now_s()
        trials = state.lifecycle.running()
        for trial in trials:
            self._advance_fit(trial, now_s)
        waiting = waiting_views(state)
        outlooks = state.ranking.outlooks(trials, state.lifecycle.trials.values())
        if not trials and not waiting:
            return None
        return Snapshot(
            now_s=now_s,
            seed=state.spec.seed,
            plan=state.plan,
            devices=tuple(sorted(state.devices.values(), key=lambda device: device.device_id)),
            trials=tuple(self._view(trial, now_s, outlooks[trial.trial_id]) for trial in trials),
            node_types=node_type_views(state),
            waiting=waiting,
            max_cost_per_hour=state.spec.max_cost_per_hour,
        )

    def accept(self, snapshot: Snapshot, plan: Plan) -> bool:
        """Take a plan that breaks no invariant: journal it, then make it the target. False when it was refused."""
        violations = check(snapshot, plan)
        if violations:
            self.refuse(snapshot, "the plan breaks invariants", [violation.text for violation in violations])
            return False
        self._last_refusal = ""
        state = self._state
        if snapshot.plan is not state.plan or (is_same(state.plan, plan) and not self._waits_for_a_target()):
            return True
        state.log(PlanCommitted.of(snapshot, plan))
        state.journal.sync()
        self._begin_gains(snapshot, plan)
        state.plan = plan
        state.wishes = plan.nodes or state.wishes
        state.committed_at_s[plan.generation] = state.clock.now_s()
        state.overrides.clear()
        state.ledger.commit(plan)
        logger.info("plan.committed generation=%d %s", plan.generation, plan.reason)
        return True

    def _waits_for_a_target(self) -> bool:
        """Whether a trial came back since the plan in force was committed: even the same plan is news to it."""
        return any(line.target is None for line in self._state.ledger.lines.values())

    def refuse(self, snapshot: Snapshot, reason: str, violations: list[str]) -> None:
        """Log why a decision was not taken, once per reason, and look after trials that have no allocation yet."""
        state = self._state
        story = f"{reason}: {'; '.join(violations)}"
        if story != self._last_refusal:
            self._last_refusal = story
            logger.warning("plan.refused %s; the plan in force stays", story)
            state.log(PlanRefused(generation=state.plan.generation, reason=reason, violations=tuple(violations)))
            state.journal.sync()
        if any(state.plan.allocation(trial.trial_id) is None for trial in snapshot.trials):
            spare = FairShare().decide(snapshot)
            self.accept(snapshot, replace(spare, reason=f"{SPARE_REASON} ({reason})"))

    def offers(self) -> dict[TrialId, Grant]:
        """Grants that became possible; journalled, not yet synced."""
        granted = self._state.ledger.offer()
        for trial_id, grant in granted.items():
            self._state.log(
                Offered(
                    generation=Generation(grant.generation),
                    trial_id=trial_id,
                    settings=grant.settings,
                    units=grant.units,
                    amount=grant.amount,
                )
            )
        return granted

    def settle_gains(self) -> None:
        """Journal the realised gain of changes that have settled."""
        for trial in self._state.lifecycle.running():
            self._settle(trial.trial_id, self._state.windows[trial.trial_id].stretch())

    def _settle(self, trial_id: TrialId, now: Stretch | None, *, is_last: bool = False) -> None:
        state = self._state
        gain = state.meter.settle(trial_id, now, is_last=is_last)
        if gain is None:
            return
        check = judge_speed(gain.predicted, gain.realised)
        if check is not None:
            state.checks.setdefault(trial_id, {})[check.what] = check
        for dial in gain.dials:
            state.gains[dial].add(gain.realised)
        state.log(
            GainRealised(
                generation=Generation(gain.generation),
                trial_id=gain.trial_id,
                dial="+".join(gain.dials),
                predicted=gain.predicted,
                realised=gain.realised,
                before=_words(gain.before),
                after=_words(gain.after),
            )
        )

    def _advance_fit(self, trial: Trial, now_s: float) -> None:
        state = self._state
        observations = state.windows[trial.trial_id].observations(now_s)
        if observations:
            fit = update(state.fits[trial.trial_id], completed(state, trial.trial_id, observations))
            state.fits[trial.trial_id] = fit
            state.shape_fits[state.spec.shape(trial.params)] = fit

    def _view(self, trial: Trial, now_s: float, outlook: Outlook) -> TrialView:
        state = self._state
        view = state.windows[trial.trial_id].view(now_s)
        trial.loss = trial.loss if view.loss is None else view.loss
        return TrialView(
            trial_id=trial.trial_id,
            shape=state.spec.shape(trial.params),
            start=trial.start or state.spec.start_on(trial.size),
            limits=limits_now(state, trial),
            placement=state.ledger.lines[trial.trial_id].placement,
            weight=1.0,
            step=max(view.step, trial.step),
            num_samples=max(view.num_samples, trial.num_samples),
            target_samples=state.spec.target_samples,
            throughput_per_s=view.throughput_per_s,
            loss=trial.loss,
            is_stale=view.is_stale,
            fit=state.fits[trial.trial_id],
            override=state.overrides.get(trial.trial_id),
            **memory_fields(state, trial),
            changed_at_s=state.changed_at_s[trial.trial_id],
            began_at_s=trial.began_at_s,
            restart_s=state.restart_s,
            survival=outlook.survival,
            rung_samples=outlook.rung_samples,
            step_modes=state.step_modes.get(trial.trial_id, ()),
        )

    def _begin_gains(self, snapshot: Snapshot, plan: Plan) -> None:
        for allocation in diff(snapshot.plan, plan):
            # From here and not from the acknowledgement: a policy must not turn again what is on its way.
            self._state.changed_at_s[allocation.trial_id] = snapshot.now_s
            trial = next(t for t in snapshot.trials if t.trial_id == allocation.trial_id)
            now = self._state.windows[trial.trial_id].stretch()
            self._settle(trial.trial_id, now, is_last=True)
            self._state.meter.forget(trial.trial_id)
            before = snapshot.settings_in_force(trial)
            if before is None:
                self._begin_gain_of_resize(trial, plan, allocation)
            dials = () if before is None else changed_dials(before, allocation.settings)
            if before is None or now is None or not dials or not self._runs_with(trial.trial_id, now.generation):
                continue
            self._state.meter.committed(
                allocation.trial_id,
                plan.generation,
                dials,
                allocation.predicted_gain,
                Pace(throughput=now.samples_per_s, efficiency=_efficiency(trial, before)),
                _efficiency(trial, allocation.settings),
            )

    def _begin_gain_of_resize(self, trial: TrialView, plan: Plan, allocation: Allocation) -> None:
        """A trial that has just moved to a group of another size is compared with what it was in the old one."""
        known = self._state.paces.pop(trial.trial_id, None)
        if known is not None and self._state.lifecycle.trials[trial.trial_id].is_resized:
            pace, predicted = known
            after = _efficiency(trial, allocation.settings)
            self._state.meter.committed(trial.trial_id, plan.generation, ("workers",), predicted, pace, after)

    def _runs_with(self, trial_id: TrialId, generation: int) -> bool:
        """Whether a trial runs with what that generation gave it, and nothing newer is on its way."""
        line = self._state.ledger.lines.get(trial_id)
        if line is None or line.offers or line.applied is None:
            return False
        return line.applied.generation == generation


def _words(pace: Pace) -> dict[str, float]:
    return {"throughput": pace.throughput, "efficiency": pace.efficiency, "goodput": pace.goodput}


def _efficiency(trial: TrialView, settings: Settings) -> float:
    return efficiency_of(trial.fit, trial.start.global_batch, settings.global_batch)
