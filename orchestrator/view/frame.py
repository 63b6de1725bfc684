"""What the live table shows, as plain lines: a pure function of a status, a width and the time.

Knows nothing of terminals or colours; each line says what it is, and `view.terminal` decides how that looks. Strings
are clean (see `view.text`). Below `WIDE` columns a running trial takes two lines, from there on one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.view.text import (
    MISSING,
    clean,
    clip,
    clip_front,
    dicts,
    mapping,
    number,
    pad,
    show_count,
    show_gain,
    show_gib,
    show_number,
    show_params,
    show_seconds,
    whole,
    width_of,
    wrap,
)

WIDE = 160
WITH_METRIC = 100
"""Columns from which a running trial's metric has room beside the decision, which matters more."""

MIN_WIDTH = 40
STALE_AFTER_S = 15.0
_LEAST_PARAMS = 28
"""Columns for the parameters of a trial, at least; what is shown behind them is cut then."""
_BAR_CELLS = 10
_ERROR_CHARACTERS = 400
_ORDER = ("running", "failed", "queued", "paused", "done", "stopped")
DIALS = ("share", "batch", "precision")


class Role(StrEnum):
    """What a line is."""

    TITLE = "title"
    HEAD = "head"
    RUNNING = "running"
    WAITING = "waiting"
    ENDED = "ended"
    FAILED = "failed"
    DETAIL = "detail"
    DEVICE = "device"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of text of at most the frame's width, and what it is."""

    text: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What one refresh shows."""

    lines: tuple[Line, ...]

    @property
    def text(self) -> str:
        """All lines as they stand."""
        return "\n".join(line.text for line in self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    name: str
    width: int
    is_number: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """Words that are the same in every trial's line."""

    metric: str
    unit: str


_COLUMNS = (
    _Column(name="trial", width=12, is_number=False),
    _Column(name="state", width=7, is_number=False),
    _Column(name="step", width=5),
    _Column(name="loss", width=7),
    _Column(name="samples/s", width=9),
    _Column(name="share", width=5),
    _Column(name="batch", width=8),
    _Column(name="tier", width=4, is_number=False),
    _Column(name="left", width=7),
)


def build_frame(status: Mapping[str, object], *, width: int, max_rows: int, now_s: float) -> Frame:
    """Lay out a status.

    Args:
        status: the content of `status.json`.
        width: columns of the terminal; below `MIN_WIDTH` lines are cut at that.
        max_rows: trials shown at most; the rest is counted.
        now_s: seconds since the epoch, for how old the status is.
    """
    width = max(width, MIN_WIDTH)
    trials = sorted(dicts(status.get("trials")), key=_rank)
    shown = trials[: max(1, max_rows)]
    lines = [*_title(status, trials, width, now_s), _line(_cells_of_head(width), Role.HEAD, width)]
    words = _Shown(
        metric=clean(status.get("metric") or "metric"),
        unit=_unit({str(device.get("kind")) for device in dicts(status.get("devices"))}),
    )
    for trial in shown:
        lines.extend(_trial_lines(trial, words, width))
    if len(trials) > len(shown):
        counts = _counts(trials[len(shown) :])
        lines.append(_line(f"... and {len(trials) - len(shown)} more: {counts}", Role.NOTE, width))
    lines.extend(_line(_device(device), Role.DEVICE, width) for device in dicts(status.get("devices")))
    lines.extend(_line(text, Role.DEVICE, width) for text in node_texts(status))
    lines.append(_line("dials: " + "; ".join(dial_texts(status)), Role.NOTE, width))
    for trial in trials:
        if trial.get("state") == "failed":
            lines.extend(_failure(trial, width))
    return Frame(lines=tuple(lines))


def plain_line(status: Mapping[str, object], now_s: float) -> str:
    """The same facts on one line, for a log or a terminal that cannot redraw."""
    trials = sorted(dicts(status.get("trials")), key=_rank)
    name = clean(status.get("metric") or "metric")
    parts = [
        f"{_elapsed(status, now_s)} {_state(status)} plan {show_count(status.get('generation'))}: {_counts(trials)}"
    ]
    for trial in trials:
        if trial.get("state") == "running":
            rate = f"{show_number(trial.get('throughput_per_s'), 3)} samples/s"
            metric = _prefixed(_metric(trial, name))
            parts.append(
                f"{clean(trial.get('trial_id'))} step {show_count(trial.get('step'))}"
                f" loss {show_number(trial.get('loss'))}{metric} {rate} share {show_number(trial.get('share'), 2)}"
                f" ({_enforced(trial)}){_checked(trial)} batch {_batch(trial)} {_tier(trial)}{_tier_layers(trial)}"
                f" left {show_seconds(trial.get('time_left_s'))}{_prefixed(_notes(trial))}{_prefixed(_decision(trial))}"
            )
    for device in dicts(status.get("devices")):
        parts.append(
            f"{clean(device.get('device_id'))} granted {_percent(device.get('granted_share'))}"
            f" used {_percent(device.get('utilisation_ratio'))}"
        )
    parts.extend(node_texts(status))
    parts.extend(clean(text) for text in (status.get("trouble"), *_alarms(status)) if text)
    parts.append("dials " + ", ".join(dial_texts(status)))
    return " | ".join(parts)


def failure_text(trial: Mapping[str, object]) -> str:
    """Which trial failed, why, and where its log is, on one line."""
    error = clip(clean(trial.get("error") or "no reason was given"), _ERROR_CHARACTERS)
    return f"{clean(trial.get('trial_id'))} failed: {error}; log: {clean(trial.get('log_path') or MISSING)}"


def shown_dials(dials: Mapping[str, object]) -> tuple[str, ...]:
    """The dials that every run has, and that of the ranks where it is on."""
    return (*DIALS, *(["workers"] if "workers" in dials else []))


def node_texts(status: Mapping[str, object]) -> list[str]:
    """What nodes are there, wanted and paid for, one text per type that can be asked for."""
    texts = []
    for nodes in dicts(status.get("nodes")):
        spot = " (spot)" if nodes.get("is_spot") else ""
        leaving = whole(nodes.get("num_leaving")) or 0
        texts.append(
            f"nodes {clean(nodes.get('node_type') or MISSING)}{spot}: {show_count(nodes.get('num_nodes'))} there"
            + (f", {leaving} of them leaving" if leaving else "")
            + f", {show_count(nodes.get('num_wished'))} wanted,"
            f" {show_number(nodes.get('cost_per_hour'), 3)} an hour{_because(nodes.get('reason'))}"
        )
    return texts


def _because(reason: object) -> str:
    return f": {clean(reason)}" if reason else ""


def dial_texts(status: Mapping[str, object]) -> list[str]:
    """What each dial did so far, one text per dial."""
    texts = []
    dials = mapping(status.get("dials"))
    for name in shown_dials(dials):
        dial = mapping(dials.get(name))
        if not dial.get("enabled"):
            texts.append(f"{name} off")
            continue
        changes = whole(dial.get("changes_applied")) or 0
        gain = "" if number(dial.get("gain")) is None else f", gain {show_gain(dial.get('gain'))}"
        texts.append(f"{name} {changes} change{'s' * (changes != 1)}{gain}")
    return texts


def _title(
    status: Mapping[str, object], trials: Sequence[Mapping[str, object]], width: int, now_s: float
) -> list[Line]:
    metric = f"{clean(status.get('metric') or MISSING)} ({clean(status.get('mode') or MISSING)})"
    lines = [
        _line(
            f"{clean(status.get('run_id') or MISSING)}  {_state(status)} {_elapsed(status, now_s)}"
            f"  policy {clean(status.get('policy') or MISSING)}  plan {show_count(status.get('generation'))}  {metric}",
            Role.TITLE,
            width,
        ),
        _line(_counts(trials), Role.NOTE, width),
    ]
    age_s = now_s - (number(status.get("updated_at")) or now_s)
    if age_s > STALE_AFTER_S and _state(status) in {"starting", "running", "stopping"}:
        text = "the policy actor is silent; training goes on, and the driver replaces it"
        lines.append(_line(f"no news for {show_seconds(age_s)}: {text}", Role.FAILED, width))
    elif _state(status) == "lost":
        text = "the driver of the run is gone: `orchestrator resume` goes on from its last checkpoints"
        lines.append(_line(text, Role.FAILED, width))
    elif status.get("trouble"):
        lines.append(_line(f"nothing is decided: {clean(status['trouble'])}", Role.FAILED, width))
    lines.extend(_line(clean(text), Role.FAILED, width) for text in _alarms(status))
    return lines


def _alarms(status: Mapping[str, object]) -> list[object]:
    """What people should see to."""
    alarms = status.get("alarms")
    return list(alarms) if isinstance(alarms, list) else []


def _trial_lines(trial: Mapping[str, object], shown: _Shown, width: int) -> list[Line]:
    state = clean(trial.get("state") or MISSING)
    columns = _fitted(_COLUMNS, width)
    cells = [
        clip_front(clean(trial.get("trial_id") or MISSING), columns[0].width),
        state,
        show_count(trial.get("step")),
    ]
    if state != "running":
        role = {"queued": Role.WAITING, "paused": Role.WAITING, "failed": Role.FAILED}.get(state, Role.ENDED)
        text = f"{_row(cells, columns)}  {_metric(trial, shown.metric)}".rstrip()
        why = _why_away(trial, state)
        params = _params(trial, width - width_of(text) - width_of(why) - 4)
        return [_line(f"{text}  {params}{f'; {why}' if why else ''}", role, width)]
    cells += [
        show_number(trial.get("loss")),
        show_number(trial.get("throughput_per_s")),
        show_number(trial.get("share"), 3),
        _batch(trial),
        _tier(trial),
        show_seconds(trial.get("time_left_s")),
    ]
    row = _row(cells, columns)
    metric = _metric(trial, shown.metric) if width >= WITH_METRIC else ""
    mode = trial.get("step_mode")
    steps = f"{mode} steps" if mode in {"graph", "compiled", "bundle"} else ""
    waits = "waits at its rung for others" if trial.get("waits_at_rung") is True else ""
    texts = (
        _notes(trial),
        metric,
        _held(trial, shown.unit),
        steps,
        _resize(trial),
        waits,
        _off(trial),
        _decision(trial),
    )
    details = "; ".join(text for text in texts if text)
    params = _params(trial, width - width_of(details) - (width_of(row) if width >= WIDE else 0) - 4)
    details = "; ".join(text for text in (params, details) if text)
    if width >= WIDE:
        return [_line(f"{row}  {details}", Role.RUNNING, width)]
    return [_line(row, Role.RUNNING, width), _line(f"  {details}", Role.DETAIL, width)]


def _why_away(trial: Mapping[str, object], state: str) -> str:
    """What a trial that does not run waits for, where somebody or the policy decided that."""
    if trial.get("is_held") is True and state not in {"done", "stopped", "failed"}:
        return "paused by request, until resume --trial"
    decision = mapping(trial.get("decision"))
    return clean(decision.get("reason") or "") if state == "queued" else ""


def _params(trial: Mapping[str, object], room: int) -> str:
    """The parameters of a trial, the searched ones first, in the room there is or a little more."""
    return show_params(mapping(trial.get("params")), max(_LEAST_PARAMS, room))


def _row(cells: Sequence[str], columns: Sequence[_Column]) -> str:
    """Cells under their columns; there may be fewer of them."""
    return "  ".join(
        pad(cell, column.width, right=column.is_number) for cell, column in zip(cells, columns, strict=False)
    )


def _cells_of_head(width: int) -> str:
    head = "  ".join(pad(column.name, column.width, right=column.is_number) for column in _fitted(_COLUMNS, width))
    return f"{head}  parameters; metric; share enforced by; last decision" if width >= WIDE else head


def _fitted(columns: Sequence[_Column], width: int) -> list[_Column]:
    """Give the first column (the name) what a wide terminal has to spare."""
    first, *others = columns
    spare = 8 if width >= WIDE else 0
    narrow = sum(column.width for column in columns) + 2 * len(others) - width
    name_width = first.width + spare if narrow <= 0 else max(4, first.width - narrow)
    return [_Column(name=first.name, width=name_width, is_number=False), *others]


def _device(device: Mapping[str, object]) -> str:
    granted = number(device.get("granted_share")) or 0.0
    cells = round(_BAR_CELLS * min(max(granted, 0.0), 1.0))
    unit = _unit({str(device.get("kind"))})
    memory = f"memory {show_gib(device.get('memory_used_bytes'))}/{show_gib(device.get('memory_total_bytes'))} GiB"
    return (
        f"{clean(device.get('device_id') or MISSING)} [{'#' * cells}{'.' * (_BAR_CELLS - cells)}]"
        f" granted {_percent(device.get('granted_share'))} of {show_count(device.get('units'))} {unit},"
        f" used {_percent(device.get('utilisation_ratio'))}, {memory}"
    )


def _failure(trial: Mapping[str, object], width: int) -> list[Line]:
    return [Line(text=text, role=Role.FAILED) for text in wrap(failure_text(trial), width)]


def _rank(trial: Mapping[str, object]) -> tuple[int, int]:
    state = str(trial.get("state"))
    return _ORDER.index(state) if state in _ORDER else len(_ORDER), whole(trial.get("index")) or 0


def _counts(trials: Sequence[Mapping[str, object]]) -> str:
    counts = Counter(clean(trial.get("state") or MISSING) for trial in trials)
    named = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}" + (f": {named}" if named else "")


def _state(status: Mapping[str, object]) -> str:
    return clean(status.get("state") or MISSING)


def _elapsed(status: Mapping[str, object], now_s: float) -> str:
    started = number(status.get("started_at"))
    is_over = _state(status) in {"done", "failed", "interrupted"}
    until = (number(status.get("updated_at")) or now_s) if is_over else now_s
    return MISSING if started is None else show_seconds(until - started)


def _batch(trial: Mapping[str, object]) -> str:
    if trial.get("micro_batch") is None:
        return MISSING
    ranks = whole(trial.get("num_workers")) or 1
    batch = f"{show_count(trial.get('micro_batch'))}x{show_count(trial.get('grad_accum'))}"
    return batch if ranks == 1 else f"{batch}*{ranks}"


def _off(trial: Mapping[str, object]) -> str:
    """The dials that the trial's training does not have, each with its reason."""
    off = mapping(trial.get("off"))
    return ", ".join(f"{clean(name)} off ({clean(reason)})" for name, reason in sorted(off.items()))


def _notes(trial: Mapping[str, object]) -> str:
    """What is amiss with the trial."""
    notes = trial.get("notes")
    return "; ".join(f"! {clean(note)}" for note in notes) if isinstance(notes, list) else ""


def _tier(trial: Mapping[str, object]) -> str:
    return clean(trial.get("tier") or MISSING)


def _tier_layers(trial: Mapping[str, object]) -> str:
    """How many layers are in the tier, where not all of them are."""
    parts = str(trial.get("tier_layers") or "").split(" of ")
    return f" (in {parts[0]} of {parts[1]} layers)" if len(parts) == 2 and parts[0] != parts[1] else ""


def _enforced(trial: Mapping[str, object]) -> str:
    return clean(trial.get("enforced_by") or "nothing")


def _metric(trial: Mapping[str, object], name: str) -> str:
    """The metric of a trial's last report; nothing before the first one."""
    value = number(trial.get("metric_value"))
    return "" if value is None else f"{name} {show_number(value)}"


def _held(trial: Mapping[str, object], unit: str) -> str:
    """What the share amounts to, what enforces it, and whether it was seen to."""
    return f"{show_number(trial.get('amount'), 3)} {unit} by {_enforced(trial)}{_checked(trial)}"


def _checked(trial: Mapping[str, object]) -> str:
    """What was seen of the share: that it is held, or what is not; nothing before anything was seen."""
    shares = [check for check in dicts(trial.get("checks")) if check.get("what") != "speed"]
    deviations = [clean(check.get("reason")) for check in shares if check.get("verdict") == "not held"]
    if deviations:
        return f" ({', '.join(deviations)})"
    return " (held)" if any(check.get("verdict") == "held" for check in shares) else ""


def _resize(trial: Mapping[str, object]) -> str:
    """That a worker group of another size is on its way for the trial."""
    ranks = whole(trial.get("resize_to"))
    return "" if ranks is None else f"{ranks} rank{'s' * (ranks != 1)} on their way"


def _unit(kinds: set[str]) -> str:
    """What a share is cut from on devices of these kinds."""
    return "cores" if kinds == {"cpu"} else "SM groups" if kinds == {"cuda"} else "units"


def _decision(trial: Mapping[str, object]) -> str:
    decision = mapping(trial.get("decision"))
    if not decision:
        return ""
    return f"plan {show_count(decision.get('generation'))}: {clean(decision.get('reason') or MISSING)}"


def _prefixed(text: str) -> str:
    return f" {text}" if text else ""


def _percent(value: object) -> str:
    known = number(value)
    return MISSING if known is None else f"{100 * known:.0f} %"


def _line(text: str, role: Role, width: int) -> Line:
    return Line(text=clip(text.rstrip(), width), role=role)
