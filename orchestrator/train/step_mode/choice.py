"""Which step mode a trial uses: measured, not assumed.

For each combination of dials a few eager steps are timed and then a few replayed ones; the faster mode stays. That
eager steps are faster is believed only when it was seen several times over: a replayed step launches what an eager one
does and is hardly ever the slower one, but beside busy trials a few of either may look so, and a trial that stays eager
by mistake takes up to several times as long. A model, optimizer or device that cannot be recorded stays eager, and says
why. Where the stepper had replayed steps compiled, these are timed against the others in turn. Pure bookkeeping: no
torch, no clock; called by the stepper.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import StepModeView

NUM_EAGER = 3
"""Eager steps per combination of dials; the first ones also load kernels, so the fastest counts."""

NUM_GRAPH = 6
"""Replayed steps; their typical time counts, since single ones come back in bursts."""

MAX_ROUNDS = 3
"""How often eager steps must have been the faster ones."""

NUM_RACES = 3
"""How often compiled steps are timed against others; the mode that was faster more often stays."""


class StepMode(StrEnum):
    """How steps are executed; `auto` measures. Compiled steps are replayed too, of kernels that torch.compile made."""

    AUTO = "auto"
    EAGER = "eager"
    GRAPH = "graph"
    COMPILED = "compiled"

    @property
    def is_replayed(self) -> bool:
        """Whether the GPU is given whole steps."""
        return self in {StepMode.GRAPH, StepMode.COMPILED}


@dataclass(slots=True)
class _Race:
    """Steps replayed as they are against compiled ones, in turn."""

    graph: list[float] = field(default_factory=list)
    compiled: list[float] = field(default_factory=list)
    savings: list[float] = field(default_factory=list)

    @property
    def next_mode(self) -> StepMode:
        """Compiled ones first."""
        return StepMode.COMPILED if len(self.compiled) < NUM_GRAPH else StepMode.GRAPH

    @property
    def is_over(self) -> bool:
        """Whether it is known which are faster."""
        return len(self.savings) == NUM_RACES

    @property
    def saving(self) -> float:
        """Part of a replayed step that compiling saves."""
        return statistics.median(self.savings)

    def note(self, mode: StepMode, seconds: float) -> None:
        """Take in a step."""
        kept = self.compiled if mode is StepMode.COMPILED else self.graph
        # A step on its way when the other kind began comes back late, and belongs to no turn.
        if mode is self.next_mode and len(kept) < NUM_GRAPH:
            kept.append(seconds)
        if len(self.graph) == NUM_GRAPH:
            self.savings.append(1 - statistics.median(self.compiled) / statistics.median(self.graph))
            if not self.is_over:
                self.graph.clear()
                self.compiled.clear()


@dataclass(slots=True)
class _Times:
    """Seconds per step of one combination of dials, by mode, in rounds; what was chosen once that is clear."""

    eager: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)
    num_rounds: int = 0
    chosen: StepMode | None = None
    race: _Race | None = None
    loser: StepMode | None = None
    not_compiled: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether the mode stays, as far as is known."""
        return self.chosen is not None and (self.race is None or self.race.is_over)

    @property
    def next_mode(self) -> StepMode:
        """The chosen mode; before that the one to be timed."""
        if self.race is not None and not self.race.is_over:
            return self.race.next_mode
        if self.chosen is not None:
            return self.chosen
        is_eager_next = self._is_over or len(self.eager) < NUM_EAGER
        return StepMode.EAGER if is_eager_next else StepMode.GRAPH

    def note(self, mode: StepMode, seconds: float) -> None:
        """Take in a step, unless enough is known."""
        if self.race is not None and not self.race.is_over:
            self.race.note(mode, seconds)
            if self.race.is_over:
                is_faster = self.race.saving > 0
                self.chosen = StepMode.COMPILED if is_faster else StepMode.GRAPH
                self.loser = StepMode.GRAPH if is_faster else StepMode.COMPILED
        if self.chosen is not None or mode is StepMode.COMPILED:
            return
        if self._is_over:
            self.eager.clear()
            self.graph.clear()
        kept, limit = (self.graph, NUM_GRAPH) if mode is StepMode.GRAPH else (self.eager, NUM_EAGER)
        if len(kept) < limit:
            kept.append(seconds)
        if not self._is_over:
            return
        self.num_rounds += 1
        if statistics.median(self.graph) <= min(self.eager):
            self.chosen = StepMode.GRAPH
        elif self.num_rounds == MAX_ROUNDS:
            self.chosen = StepMode.EAGER

    @property
    def _is_over(self) -> bool:
        """Whether both modes were timed in this round."""
        return len(self.eager) == NUM_EAGER and len(self.graph) == NUM_GRAPH


class ModeChoice:
    """The mode of each step of one trial.

    Args:
        wish: what the user asks for.
        refusal: why steps cannot be replayed at all, None if they may.
        refusal_of: why steps with some dials cannot be, None if they may.
    """

    def __init__(
        self, wish: StepMode, refusal: str | None, refusal_of: Callable[[object], str | None] = lambda _: None
    ) -> None:
        self._wish, self.refusal, self._refusal_of = wish, refusal, refusal_of
        self._times: dict[object, _Times] = {}

    def refuse(self, reason: str) -> None:
        """Steps of this trial cannot be replayed after all."""
        self.refusal = reason

    def mode(self, key: object) -> StepMode:
        """How to do the next step with these dials."""
        if self._wish is StepMode.EAGER or self._why_not(key) is not None:
            return StepMode.EAGER
        if self._wish is StepMode.GRAPH:
            return StepMode.GRAPH
        times = self._times.setdefault(key, _Times())
        if self._wish is StepMode.COMPILED:
            return StepMode.GRAPH if times.not_compiled else StepMode.COMPILED
        return times.next_mode

    def may_compile(self, key: object) -> float | None:
        """Seconds per step of the replayed steps that might be compiled; None where they are not to be."""
        times = self._times.get(key)
        if self._wish is not StepMode.AUTO or times is None or times.chosen is not StepMode.GRAPH:
            return None
        if times.race is not None or times.not_compiled:
            return None
        return statistics.median(times.graph)

    def race(self, key: object) -> None:
        """Compiled steps are there; time them against the others."""
        self._times[key].race = _Race()

    def not_compiled(self, key: object, reason: str) -> None:
        """Steps of these dials cannot be compiled, or no longer: on another stream they are recorded anew."""
        times = self._times[key]
        times.not_compiled, times.race, times.loser = reason, None, None
        if times.chosen is StepMode.COMPILED:
            times.chosen = StepMode.GRAPH

    def take_loser(self, key: object) -> tuple[StepMode, float] | None:
        """Once after a race: the mode that will not be used again, and what part of a step compiling saves."""
        times = self._times.get(key)
        if times is None or times.loser is None or times.race is None:
            return None
        loser, times.loser = times.loser, None
        return loser, times.race.saving

    def note(self, key: object, mode: StepMode, seconds: float) -> None:
        """A step of these dials took so long."""
        self._times.setdefault(key, _Times()).note(mode, seconds)

    def is_settled(self, key: object) -> bool:
        """Whether the mode of these dials is known and stays."""
        is_given = self._wish is not StepMode.AUTO or self._why_not(key) is not None
        return is_given or self._times.get(key, _Times()).is_settled

    def measured(self, key: object, settings: Settings) -> StepModeView | None:
        """The mode of these dials, `settings` in full, and the times it was chosen by; None where not measured."""
        times = self._times.get(key, _Times())
        if self._wish is not StepMode.AUTO or self._why_not(key) is not None or not times.is_settled:
            return None
        return StepModeView(
            tier=settings.tier,
            micro_batch=settings.micro_batch,
            grad_accum=settings.grad_accum,
            is_replayed=times.chosen is not StepMode.EAGER,
            eager_s=min(times.eager),
            replayed_s=statistics.median(
                times.race.compiled if times.race is not None and times.chosen is StepMode.COMPILED else times.graph
            ),
        )

    def words(self, key: object) -> str:
        """The mode and why, for people."""
        mode = self.mode(key)
        refusal = self._why_not(key)
        if refusal is not None:
            return f"eager: {refusal}"
        times = self._times.get(key, _Times())
        why_not = f"; not compiled: {times.not_compiled}" if times.not_compiled else ""
        if self._wish is not StepMode.AUTO:
            return f"{mode}: as asked for{why_not}" if mode is self._wish else f"{mode}{why_not}"
        eager = f"{1e3 * min(times.eager):.2f} ms" if times.eager else "not measured"
        graph = f"{1e3 * statistics.median(times.graph):.2f} ms" if times.graph else "not measured"
        race = times.race
        compiled = "" if race is None or not race.is_over else f", compiled {1 - race.saving:.2f} of graph"
        return f"{mode}: eager {eager}, graph {graph} per step{compiled}{why_not}"

    def _why_not(self, key: object) -> str | None:
        """Why steps with these dials cannot be replayed, None if they may."""
        return self.refusal or self._refusal_of(key)
