"""Who is stepped with whom: the trials of one process, gathered into bundles by kind.

A trial that asks for steps is put into the bundle of its kind; where that cannot be, it is told why and steps alone. A
bundle stays as long as its members do: one that waits keeps its row. Called by the process that serves the trials.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from orchestrator.policies.plan import Settings
from orchestrator.train.bundle.bundle import NOT_COMPILED, Bundle, Recorder, StackingError
from orchestrator.train.bundle.forward import Forward, forward_of
from orchestrator.train.bundle.kind import kind_of, why_alone
from orchestrator.train.bundle.member import Member
from orchestrator.train.course import Stepped
from orchestrator.train.precision.tiers import set_tier

logger = logging.getLogger(__name__)

STEPS_S = 0.05
"""Seconds that the steps between two boundaries fill: short ones are told of together, and orders wait no longer."""

_MEASURED, _SLOWER = 6, 1.1
"""Steps alone, and rounds of steps as one, from which both are compared; and how much slower as one is too slow."""

Name = int
"""Names one trial among those of the process: its lane."""


@dataclass(slots=True)
class _Group:
    """A bundle and who is in it, in the order of its rows."""

    bundle: Bundle
    names: list[Name]


@dataclass(slots=True)
class Company:
    """The trials of one process that may be stepped as one.

    Attributes:
        target_s: seconds that the steps between two boundaries shall fill.
        recorder: makes what records the steps of a bundle; None to execute them.
        is_compiled: whether torch.compile makes the kernels of bundles, as far as it can.
        is_measured: whether steps as one must show that they are not slower than steps alone; on a GPU, where a step
            alone is over before it is done, nobody can tell.
    """

    target_s: float = 0.0
    recorder: Callable[[], Recorder] | None = None
    is_compiled: bool = False
    is_measured: bool = False
    _groups: dict[Hashable, _Group] = field(default_factory=dict)
    _forwards: dict[Hashable, Forward] = field(default_factory=dict)
    _kinds: dict[Name, tuple[Settings, Hashable]] = field(default_factory=dict)
    _proven: dict[Hashable, set[Name]] = field(default_factory=dict)
    _refused: dict[Hashable, str] = field(default_factory=dict)
    _reasons: dict[Name, str] = field(default_factory=dict)
    _alone_s: dict[Hashable, list[float]] = field(default_factory=dict)
    _together_s: dict[Hashable, list[float]] = field(default_factory=dict)

    def why_alone(self, name: Name) -> str:
        """Why a trial is not stepped with others, empty where it is, or would be if there were any of its kind."""
        _, kind = self._kinds.get(name, (None, None))
        return self._reasons.get(name, "") or self._refused.get(kind, "")

    def step(self, asking: Mapping[Name, tuple[Member, int]]) -> dict[Name, Stepped]:
        """Step those that can be stepped with others; who is not in the answer is to step alone.

        Args:
            asking: the trials that ask, each with the most steps that it may do in a row.
        """
        kinds: dict[Hashable, list[Name]] = {}
        for name, (member, _) in asking.items():
            kind = self._kind(name, member)
            is_known = not self.is_measured or len(self._alone_s.get(kind, ())) >= _MEASURED
            if kind is not None and kind not in self._refused and is_known:
                kinds.setdefault(kind, []).append(name)
        found: dict[Name, Stepped] = {}
        for kind, names in kinds.items():
            group = self._gather(kind, {name: asking[name][0] for name in names})
            if group is None:
                continue
            rows = [group.names.index(name) for name in names if name in group.names]
            at_most = min(asking[group.names[row]][1] for row in rows)
            turn_process(group.bundle.members[0])
            try:
                results = group.bundle.advance(at_most, self.target_s, rows)
            except StackingError as error:
                self._refuse(kind, str(error))
                continue
            for row in rows:
                found[group.names[row]] = Stepped(results[row], num_together=len(rows))
            if self.is_measured and len(rows) == len(group.names):
                self._judge(kind, group)
        for name in asking.keys() - found.keys():
            self._part(name)
        return found

    def note_alone(self, name: Name, seconds: float) -> None:
        """A trial has stepped alone."""
        _, kind = self._kinds.get(name, (None, None))
        known = self._alone_s.setdefault(kind, []) if kind is not None else []
        if len(known) < _MEASURED:
            known.append(seconds)

    def _judge(self, kind: Hashable, group: _Group) -> None:
        """Let go of a kind of bundle whose steps take longer than those of its trials one after the other."""
        times = self._together_s.setdefault(kind, [])
        if group.bundle.step_s is None or len(times) >= _MEASURED:
            return
        times.append(group.bundle.step_s / len(group.names))
        # The shortest of each: others of the process or the machine make a step longer, nothing makes it shorter.
        together_s, alone_s = min(times), min(self._alone_s[kind])
        if len(times) >= _MEASURED and together_s > _SLOWER * alone_s:
            self._refuse(
                kind, f"as one a step takes {1e3 * together_s:.3g} ms of each trial, alone {1e3 * alone_s:.3g}"
            )

    def leave(self, name: Name) -> None:
        """The trial goes: it is one of its own again, as far as it has come."""
        self._part(name)
        self._kinds.pop(name, None)
        self._reasons.pop(name, None)
        for proven in self._proven.values():
            proven.discard(name)

    def _part(self, name: Name) -> None:
        """Take a trial out of its bundle, if it is in one; the others are gathered anew when they ask."""
        for kind, group in list(self._groups.items()):
            if name in group.names:
                del self._groups[kind]
                group.bundle.close()

    def _kind(self, name: Name, member: Member) -> Hashable | None:
        """The kind of a trial with its present dials, None where it has to step alone; it leaves that of before."""
        settings, kind = self._kinds.get(name, (None, None))
        if settings == member.stepper.settings:
            return kind
        if settings is None or not _is_alike(settings, member.stepper.settings):
            self._part(name)
            self._reasons[name] = why_alone(member.stepper)
            kind = None if self._reasons[name] else kind_of(member.stepper)
        self._kinds[name] = (member.stepper.settings, kind)
        return kind

    def _gather(self, kind: Hashable, members: dict[Name, Member]) -> _Group | None:
        """The bundle that holds these trials, a new one where somebody is not in it; None where there is no company."""
        group = self._groups.get(kind)
        if group is not None and members.keys() <= set(group.names):
            return group
        if group is not None:
            members = dict(zip(group.names, group.bundle.members, strict=True)) | members
            self._part(group.names[0])
        proven = self._proven.setdefault(kind, set())
        names = sorted(members, key=lambda name: name not in proven)  # those first that need not be compared again
        while len(names) > 1:
            try:
                bundle = self._bundle(kind, [members[name] for name in names], sum(name in proven for name in names))
            except StackingError as error:
                if error.row is None:
                    self._refuse(kind, str(error))
                    return None
                lone = names.pop(error.row)
                self._reasons[lone] = str(error)
                self._kinds[lone] = (members[lone].stepper.settings, None)
                continue
            proven.update(names)
            self._groups[kind] = _Group(bundle, names)
            return self._groups[kind]
        return None

    def _bundle(self, kind: Hashable, members: list[Member], first_new: int) -> Bundle:
        """A bundle of these trials, of compiled kernels where that is asked for and can be."""
        if kind not in self._forwards:
            self._forwards[kind] = forward_of(members[0], is_compiled=self.is_compiled)
        forward = self._forwards[kind]
        turn_process(members[0])
        recorder = None if self.recorder is None else self.recorder()
        if not forward.is_compiled:
            return Bundle(members, forward, recorder=recorder, first_new=first_new)
        # Kernels are made for a number of rows: so there are few such numbers, and some rows are nobody's.
        num_rows = 1 << (len(members) - 1).bit_length()
        compiler = partial(torch.compile, dynamic=False)
        try:
            return Bundle(members, forward, num_rows=num_rows, recorder=recorder, compile=compiler, first_new=first_new)
        except StackingError as error:
            if not str(error).startswith(NOT_COMPILED):
                raise
            logger.warning("a bundle is not of compiled kernels: %s", error)
            forward.is_compiled = False
            return Bundle(members, forward, recorder=recorder, first_new=first_new)

    def _refuse(self, kind: Hashable, reason: str) -> None:
        """Trials of that kind step alone in this process from here on."""
        self._refused[kind] = reason
        group = self._groups.pop(kind, None)
        if group is not None:
            group.bundle.close()


def turn_process(member: Member) -> None:
    """Set the process's switch between fp32 and tf32 as a trial wants it; there is none on a CPU."""
    if member.device.type == "cuda":
        set_tier(member.stepper.model, member.stepper.settings.tier)


def recorder_for(device: torch.device) -> Callable[[], Recorder] | None:
    """What records steps on a device, None where nothing does."""
    if device.type != "cuda":
        return None
    from orchestrator.train.step_mode.recorder import CudaRecorder

    return CudaRecorder


def _is_alike(one: Settings, other: Settings) -> bool:
    """Whether both have the same batch and tier; the share is no matter of a bundle."""
    names = ("micro_batch", "grad_accum", "tier")
    return all(getattr(one, name) == getattr(other, name) for name in names)
