"""The accounts of some trials, changed as the events of a run change them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from orchestrator.control import grants
from orchestrator.control.effects import Applied
from orchestrator.control.events import Acknowledged, Event, Offered, Overridden, PlanCommitted
from orchestrator.control.grants import Account
from orchestrator.control.orders import Grant
from orchestrator.control.transition import apply
from orchestrator.control.world import Trial, TrialState, World
from orchestrator.policies.plan import DeviceId, Generation, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceView, Snapshot
from tests.unit.orchestrator.control.worlds import spec_of

SPEC = spec_of(Path("none"))


class Books:
    """A world in which only plans, offers, acknowledgements and overrides happen."""

    def __init__(self) -> None:
        self.world = World((SPEC,))
        self.run = self.world.runs["r"]

    @property
    def lines(self) -> dict[TrialId, Account]:
        return self.run.accounts()

    def set_devices(self, devices: tuple[DeviceView, ...]) -> None:
        self.world.devices = {device.device_id: device for device in devices}

    def open_line(self, trial_id: TrialId, placement: tuple[DeviceId, ...]) -> None:
        trial = Trial(run_id="r", trial_id=trial_id, index=0, params={}, state=TrialState.RUNNING)
        trial.account = Account(placement=placement)
        self.run.trials[trial_id] = trial

    def close_line(self, trial_id: TrialId) -> None:
        self.run.trials.pop(trial_id, None)

    def held(self, device_id: DeviceId) -> float:
        return grants.held(self.lines, device_id)

    def commit(self, plan: Plan) -> None:
        devices = tuple(self.world.devices.values())
        seen = Snapshot(now_s=0.0, seed=0, plan=self.run.plan, devices=devices, trials=())
        self.happen(PlanCommitted.of(seen, plan))

    def offer(self) -> dict[TrialId, Grant]:
        found = dict(grants.offers(self.lines, self.world.devices))
        for trial_id, grant in found.items():
            values = {name: getattr(grant, name) for name in ("settings", "units", "amount")}
            event = Offered(generation=Generation(grant.generation), trial_id=trial_id, **values)
            assert self.happen(event)
        return found

    def acknowledge(self, trial_id: TrialId, generation: int) -> Grant | None:
        trial = self.run.trials.get(trial_id)
        offers = () if trial is None or trial.account is None else trial.account.offers
        grant = next((each for each in offers if each.generation == generation), None)
        event = Acknowledged(
            generation=Generation(generation),
            trial_id=trial_id,
            attempt=0,
            step=0,
            settings=SPEC.start,
            ack_s=0.0,
            switch_s=0.0,
            dials=(),
        )
        return grant if self.happen(event) else None

    def record_override(self, trial_id: TrialId, number: int, settings: Settings, generation: int = 0) -> bool:
        event = Overridden(
            trial_id=trial_id, number=number, settings=settings, generation=Generation(generation), reason=""
        )
        return self.happen(event)

    def running_settings(self, trial_id: TrialId) -> Settings | None:
        account = self.run.trials[trial_id].account
        return None if account is None else account.settings

    def happen(self, event: Event) -> bool:
        return isinstance(apply(self.world, replace(event, run_id="r")), Applied)
