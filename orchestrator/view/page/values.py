"""What the page of a run holds, as frozen values; `build` writes them as JSON, and the page's scripts draw them.

Times are in seconds since the run's first entry, device-seconds are a share times seconds, summed over ranks. A number
that is not known, or not finite, is None. Knows nothing of files. Made by `gather`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Numbers = tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One value of a trial over its course; all four have the same length.

    Attributes:
        samples: trained on so far.
        seconds: spent in a slot so far.
        device_s: device-seconds used so far.
        values: the loss, or a metric.
    """

    samples: Numbers
    seconds: Numbers
    device_s: Numbers
    values: Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """One attempt of a trial in a slot; `end_s` is None while it goes on."""

    start_s: float
    end_s: float | None
    attempt: int
    slot: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dials:
    """The dials of a trial from `start_s` to `end_s`, as it acknowledged them."""

    start_s: float
    end_s: float
    share: float
    micro_batch: int
    grad_accum: int
    global_batch: int
    tier: str
    num_workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something that happened to a trial, and why.

    Attributes:
        kind: dials, override, ranks, paused, queued, continued or ended.
        what: in words, such as `share 0.5 to 1`.
        dials: those that turned.
        generation: of the decision, None for what was not decided by the policy.
        predicted, realised: gain in goodput, as a ratio.
    """

    t_s: float
    kind: str
    what: str
    reason: str
    dials: tuple[str, ...] = ()
    step: int | None = None
    generation: int | None = None
    predicted: float | None = None
    realised: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A word that holds from `start_s` to `end_s`: the execution of steps."""

    start_s: float
    end_s: float
    word: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values over time, of the same length."""

    t_s: Numbers
    values: Numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPage:
    """One trial.

    Attributes:
        best: best reported value of the search's metric; `last` the newest.
        why: how it ended, or why it waits; empty for one that runs or is done.
        params: the parameters by name, nested values as JSON text.
        curves: training loss under `""`, metrics under their names.
        num_changes: all there were; `changes` holds the newest of them.
        memory: peak memory of rank 0 in bytes.
    """

    trial_id: str
    state: str
    best: float | None
    last: float | None
    why: str
    log: tuple[str, ...]
    params: Mapping[str, object]
    step: int | None
    num_samples: int | None
    seconds: float
    device_s: float
    curves: Mapping[str, Curve]
    stays: tuple[Stay, ...]
    dials: tuple[Dials, ...]
    changes: tuple[Change, ...]
    num_changes: int
    execution: tuple[Span, ...]
    memory: Series


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What one change of dials was to bring and brought, as ratios of goodput."""

    dial: str
    trial_id: str
    t_s: float
    generation: int
    predicted: float | None
    realised: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DialPage:
    """One dial: whether the policy may turn it, how often it was turned, its gains in `RunPage.gains`."""

    name: str
    is_enabled: bool
    num_changes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePage:
    """One device over time; `granted` is the share that trials of this run held, `used` what was measured in use."""

    device_id: str
    kind: str
    t_s: Numbers
    granted: Numbers
    used: Numbers
    memory: Numbers
    memory_total: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """The share of the metric's variance that each parameter explains, largest first; `note` says why there is none."""

    shares: tuple[tuple[str, float], ...]
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """One run.

    Attributes:
        searched: names of parameters that differ between trials or were drawn; `fixed` all others.
        best_so_far: over `seconds` of the run and device-seconds, the best value of the metric reported by any trial.
        notes: what could not be read, or was left out.
    """

    name: str
    state: str
    policy: str
    metric: str
    mode: str
    started_at: float | None
    elapsed_s: float
    device_s: float
    num_decisions: int
    num_refusals: int
    trouble: str
    searched: tuple[str, ...]
    fixed: tuple[str, ...]
    trials: tuple[TrialPage, ...]
    gains: tuple[Gain, ...]
    dials: tuple[DialPage, ...]
    devices: tuple[DevicePage, ...]
    importance: Importance
    best_so_far: Curve
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The whole page: one run or several."""

    written_at: float
    runs: tuple[RunPage, ...]
