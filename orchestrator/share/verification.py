"""Whether a share is real: what can be observed of it, against what it should be. Arithmetic on numbers handed in.

What a mechanism says of itself (`Enforcement`) is a claim; a `Check` is what was seen while a trial trained. A check
that cannot be made says why, and is no verdict. Knows no trial, no plan and no clock; called by `control.checks`, which
has the numbers, and by the views, which show them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.share.duty_cycle import BURST_S

LEAST_WALL_S = 3.0
"""Seconds of steps over which CPU time is compared; over fewer the burst that a duty cycle allows weighs too much."""
MIN_STEPS = 5

CPU_MARGIN = 0.1
"""Part by which CPU time may exceed the granted cores, beside one step's overdraft and the burst."""

MEMORY_MARGIN = 0.05
"""Part by which a process's memory may exceed its cap: fragments and libraries' buffers are nobody's tensors."""

NEIGHBOUR_FACTOR = 1.6
"""Slowdown beside a neighbour from which a trial does not have its SM groups to itself.

Two matrix products on disjoint groups of one H200 slowed each other 1.32 times (L2, bandwidth, power), on the same
groups 1.96 times; this is the geometric middle. Source: one run each, see `share/README.md`.
"""

SPEED_TOLERANCE = 0.3
"""Part by which the realised goodput after a change may differ from the predicted one, either way."""


class Subject(StrEnum):
    """What is checked."""

    COMPUTE = "compute"
    MEMORY = "memory"
    NEIGHBOURS = "neighbours"
    SPEED = "speed"


class Verdict(StrEnum):
    """What came of a check."""

    HELD = "held"
    NOT_HELD = "not held"
    NOT_OBSERVABLE = "not observable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was checked.

    Attributes:
        what: the subject.
        expected: the most it should be (of a speed: what was predicted); None where that is not known.
        observed: what was seen, in the same unit; None where nothing could be.
        unit: of both: cores, bytes, or times (a ratio of step times or of goodputs).
        verdict: what follows.
        reason: the verdict in words, with the numbers or why there are none.
    """

    what: Subject
    expected: float | None
    observed: float | None
    unit: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """CPU time of one rank while it had the same number of cores.

    Attributes:
        cores: granted.
        num_steps: steps behind it.
        wall_s: what they took.
        cpu_s: CPU seconds of its process in them, all threads.
        longest_cpu_s: the most that one step used: a duty cycle settles after it, not before.
    """

    cores: float
    num_steps: int
    wall_s: float
    cpu_s: float
    longest_cpu_s: float


def unobservable(what: Subject, unit: str, reason: str, expected: float | None = None) -> Check:
    """A check that could not be made, and why."""
    return Check(what=what, expected=expected, observed=None, unit=unit, verdict=Verdict.NOT_OBSERVABLE, reason=reason)


def judge_cpu(amount: float, usage: Usage | None) -> Check:
    """CPU time over wall time against the granted cores; using less is no deviation."""
    if usage is None or usage.num_steps < MIN_STEPS or usage.wall_s < LEAST_WALL_S:
        seconds = 0.0 if usage is None else usage.wall_s
        reason = f"only {seconds:.1f} s of steps with {amount:.3g} cores so far; {LEAST_WALL_S:g} s are needed"
        return unobservable(Subject.COMPUTE, "cores", reason, amount)
    observed = usage.cpu_s / usage.wall_s
    # A step may begin with a full burst and end with its whole time owed; over a long time neither matters.
    allowed = amount * (1 + CPU_MARGIN) + (usage.longest_cpu_s + BURST_S * amount) / usage.wall_s
    return _judged(Subject.COMPUTE, amount, observed, "cores", observed <= allowed, f"over {usage.wall_s:.1f} s")


def judge_memory(cap_bytes: int, used_bytes: int | None, source: str) -> Check:
    """Memory of the fullest rank against its cap; `source` says who counted, or why nobody could."""
    if used_bytes is None:
        return unobservable(Subject.MEMORY, "bytes", source, float(cap_bytes))
    is_held = used_bytes <= cap_bytes * (1 + MEMORY_MARGIN)
    return _judged(Subject.MEMORY, float(cap_bytes), float(used_bytes), "bytes", is_held, source)


def judge_neighbours(ratio: float, new: tuple[str, ...]) -> Check:
    """A trial's step time beside `new` neighbours, as a ratio of its own without them at the same share and dials."""
    names = ", ".join(new)
    is_held = ratio <= NEIGHBOUR_FACTOR
    words = f"beside {names}" if is_held else f"beside {names}: more than disjoint groups explain, or the host is short"
    return _judged(Subject.NEIGHBOURS, NEIGHBOUR_FACTOR, ratio, "times", is_held, words)


def judge_speed(predicted_gain: float | None, realised_gain: float) -> Check | None:
    """Goodput after a change over goodput before it, against the prediction; None where nothing was predicted."""
    if predicted_gain is None or predicted_gain <= -1:
        return None
    expected, observed = 1 + predicted_gain, 1 + realised_gain
    is_held = abs(observed / expected - 1) <= SPEED_TOLERANCE
    return _judged(Subject.SPEED, expected, observed, "times", is_held, "of the goodput before the change")


def amount_words(value: float | None, unit: str) -> str:
    """A number of a check with its unit, for people."""
    if value is None:
        return "?"
    return f"{value / 2**30:.2f} GiB" if unit == "bytes" else f"{value:.2f} {unit}"


def _judged(what: Subject, expected: float, observed: float, unit: str, is_held: bool, more: str) -> Check:
    verdict = Verdict.HELD if is_held else Verdict.NOT_HELD
    reason = f"{what} {verdict}: {amount_words(observed, unit)}, {_bound(what)} {amount_words(expected, unit)}, {more}"
    return Check(what=what, expected=expected, observed=observed, unit=unit, verdict=verdict, reason=reason)


def _bound(what: Subject) -> str:
    return {Subject.SPEED: "predicted", Subject.NEIGHBOURS: "at most"}.get(what, "granted")
