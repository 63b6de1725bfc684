"""Which ranks have given no sign of life for longer than they may. Pure, on a clock that is handed in.

Each message of a rank carries its heartbeat (`orders.Beat`): a number that grows with each step, batch of an evaluation
and batch of data, and how long the next may take. What counts is the time since the number last grew, by the actor's
clock. Time in which the actor itself did not look, or could take no message, counts for nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.control.events import Event
from orchestrator.control.fault_events import RankSilent
from orchestrator.control.orders import Beat, Note
from orchestrator.control.signals import TrialNoted
from orchestrator.control.world import Run, Trial, World
from orchestrator.hung import Process
from orchestrator.policies.plan import TrialId

logger = logging.getLogger(__name__)

SHOWN_S = 6.0
"""Shown in the live table from there on; who waits beats every five seconds."""
_LONGEST_LOOK_S = 3.0
_UNHEARD = Beat(number=-1, doing="beginning", limit_s=600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """A rank that gives no sign of life.

    Attributes:
        trial_id, attempt, slot_id, epoch, rank: whose.
        pid, node_id: its process.
        silent_s: for how long.
        limit_s: how long it may be.
        doing: what it last was about.
        is_function: whether the trial is a user's function, which may be busy with anything.
    """

    trial_id: TrialId
    attempt: int
    slot_id: str
    epoch: int
    rank: int
    pid: int
    node_id: str
    silent_s: float
    limit_s: float
    doing: str
    is_function: bool

    @property
    def is_over(self) -> bool:
        """Whether that is longer than it may be."""
        return self.silent_s > self.limit_s


@dataclass(slots=True)
class _Heard:
    """The newest heartbeat of a rank, when it came, and how many of its messages are being taken."""

    beat: Beat
    since_s: float
    num_pending: int = 0


_Key = tuple[TrialId, int, int]


class Silence:
    """The heartbeats of all ranks of one run."""

    def __init__(self, world: World, run: Run) -> None:
        self._world, self._run = world, run
        self._heard: dict[_Key, _Heard] = {}
        self._looked_s: float | None = None

    def take(self, attempt: tuple[TrialId, int], rank: int, beat: Beat | None, now_s: float) -> None:
        """A message of a rank has come; until it is `taken`, the rank can send no other."""
        heard = self._heard.setdefault((*attempt, rank), _Heard(_UNHEARD, now_s))
        heard.num_pending += 1
        if beat is not None and beat.number != heard.beat.number:
            heard.beat, heard.since_s = beat, now_s
        elif beat is not None:
            heard.beat = beat

    def taken(self, attempt: tuple[TrialId, int], rank: int, waited_s: float) -> None:
        """The message was answered after so long, which was not the rank's time."""
        heard = self._heard.get((*attempt, rank))
        if heard is not None:
            heard.num_pending -= 1
            heard.since_s += waited_s

    def look(self, now_s: float, *, is_held_up: bool = False) -> list[Silent]:
        """Ranks that should be shown as silent, longest first.

        Args:
            now_s: the clock.
            is_held_up: whether the actor takes no messages at the moment, because its journal cannot be written.
        """
        gap_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        lost_s = gap_s if is_held_up else max(0.0, gap_s - _LONGEST_LOOK_S)
        for heard in self._heard.values() if lost_s else ():
            heard.since_s = min(now_s, heard.since_s + lost_s)
        found: list[Silent] = []
        known: set[_Key] = set()
        for trial in self._run.running():
            slot = self._world.slot_of(trial)
            if slot is None or slot.hello is None:
                continue
            for rank in range(len(slot.hello.placement)):
                key = (trial.trial_id, trial.attempt, rank)
                known.add(key)
                heard = self._heard.setdefault(key, _Heard(_UNHEARD, now_s))
                if not heard.num_pending and now_s - heard.since_s >= SHOWN_S:
                    found.append(self._silent(trial, rank, heard, now_s))
        self._heard = {key: heard for key, heard in self._heard.items() if key in known}
        return sorted(found, key=lambda each: -each.silent_s)

    def _silent(self, trial: Trial, rank: int, heard: _Heard, now_s: float) -> Silent:
        slot = self._world.slots[trial.slot_id or ""]
        assert slot.hello is not None
        nodes = {device.device_id: device.node_id for device in slot.hello.devices}
        return Silent(
            trial_id=trial.trial_id,
            attempt=trial.attempt,
            slot_id=slot.slot_id,
            epoch=slot.epoch,
            rank=rank,
            pid=slot.hello.pids[rank] if rank < len(slot.hello.pids) else 0,
            node_id=nodes.get(slot.hello.placement[rank], ""),
            silent_s=now_s - heard.since_s,
            limit_s=heard.beat.limit_s,
            doing=heard.beat.doing,
            is_function=self._run.spec.is_function,
        )


def noted(run: Run, silent: Sequence[Silent]) -> list[Event]:
    """What the live table says, where that has changed."""
    texts = _texts(silent)
    found: list[Event] = []
    for trial in run.running():
        text = texts.get(trial.trial_id, "")
        if trial.notes.get("silence", "") != text:
            found.append(TrialNoted(trial_id=trial.trial_id, note=Note(kind="silence", text=text)))
    return found


def found(world: World, silent: Silent, process: Process, *, is_restarted: bool) -> list[Event]:
    """The entry of what was found of a silent rank; nothing where its attempt is over."""
    attempt = (silent.trial_id, silent.attempt)
    if world.attempt_in(silent.slot_id, silent.epoch, attempt) is None:
        return []
    names = ("trial_id", "attempt", "slot_id", "rank", "silent_s", "limit_s", "doing")
    values = {name: getattr(silent, name) for name in names}
    logger.warning(
        "rank.silent trial=%s rank=%d for %.0f s (%s), process %s: %s\n%s",
        *(silent.trial_id, silent.rank, silent.silent_s, silent.doing, process.state),
        "its group is restarted" if is_restarted else "it is left alone",
        process.stack,
    )
    return [RankSilent(**values, process=process.state, stack=process.stack, is_restarted=is_restarted)]


def _texts(silent: Sequence[Silent]) -> dict[TrialId, str]:
    """For each trial which of its ranks are silent, and for how long the first of them."""
    texts: dict[TrialId, str] = {}
    for each in silent:
        ranks = sorted(other.rank for other in silent if other.trial_id == each.trial_id)
        who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        texts.setdefault(each.trial_id, f"{who} silent for {each.silent_s:.0f} s ({each.doing})")
    return texts
