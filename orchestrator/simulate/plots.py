"""Pictures of a simulation or of a run's decisions: who held what, how full the devices were, promises against results.

The only file that touches matplotlib, which is an extra. Draws into PNG files and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.errors import ConfigError, UnfitEnvironmentError

if TYPE_CHECKING:
    from orchestrator.policies.simulator import Span, Summary
    from orchestrator.simulate.replay import Replay

_SECONDS_PER_HOUR = 3600.0
_WIDTH_INCHES = 11.0
_MAX_ROWS = 200
_COLOURS = ("#3b6ea5", "#d1812c", "#4f8f4f", "#b0413e", "#7d5ba6", "#8a6d4b", "#c276a8", "#6b6b6b")


def require() -> None:
    """Say at once, and not after the simulation, that pictures cannot be drawn.

    Raises:
        UnfitEnvironmentError: matplotlib is not installed.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise UnfitEnvironmentError(
            "--plot needs matplotlib, which is not installed; install it with: pip install 'ray-orchestrator[plots]'"
        ) from None


def plot_summary(summary: Summary, num_devices: int, directory: Path) -> list[Path]:
    """Gantt, utilisation and calibration of a simulation; returns the files."""
    written = [
        _save(_gantt(summary.spans, summary.policy), directory / "gantt.png"),
        _save(_utilisation(summary, num_devices), directory / "utilisation.png"),
    ]
    pairs = [(c.predicted, c.realised) for c in summary.calibrations if c.predicted > 0 and c.realised > 0]
    if pairs:
        figure = _calibration(pairs, "goodput in samples/s", summary.policy)
        written.append(_save(figure, directory / "calibration.png"))
    return written


def plot_replay(found: Replay, directory: Path) -> list[Path]:
    """Shares that a run granted over time, and predicted against realised gains; returns the files."""
    written = [_save(_shares(found), directory / "shares.png")]
    pairs = [(1 + predicted, 1 + realised) for predicted, realised in found.gains if predicted > -1 and realised > -1]
    if pairs:
        figure = _calibration(pairs, "goodput after a change over before", found.own_policy)
        written.append(_save(figure, directory / "calibration.png"))
    return written


def _figure(height_inches: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:  # noqa: ANN401 -- matplotlib is optional, so are its types
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; name a directory that may be written", "--plot"
        ) from None
    return path


def _gantt(spans: Sequence[Span], policy: str) -> Any:  # noqa: ANN401
    """A row for each job, a bar for each span; its height is the share, its shade how many devices."""
    first: dict[str, float] = {}
    for span in spans:
        first[span.name] = min(span.begin_s, first.get(span.name, span.begin_s))
    names = sorted(first, key=lambda name: (first[name], name))
    shown = {name: row for row, name in enumerate(names[:_MAX_ROWS])}
    figure, axes = _figure(min(14.0, 2.0 + 0.16 * len(shown)))
    kinds = sorted({span.application for span in spans})
    colours = {kind: _COLOURS[index % len(_COLOURS)] for index, kind in enumerate(kinds)}
    most = max((len(span.placement) for span in spans), default=1)
    for kind in kinds:
        mine = [span for span in spans if span.application == kind and span.name in shown]
        if not mine:
            continue
        axes.barh(
            [shown[span.name] for span in mine],
            [(span.end_s - span.begin_s) / _SECONDS_PER_HOUR for span in mine],
            left=[span.begin_s / _SECONDS_PER_HOUR for span in mine],
            height=[0.25 + 0.6 * span.share for span in mine],
            color=[(*_rgb(colours[kind]), 0.35 + 0.65 * len(span.placement) / most) for span in mine],
            label=kind,
        )
    axes.set(xlabel="hours", ylabel="jobs, in the order they began", xlim=(0, None))
    axes.margins(y=0.01)
    axes.set_title(
        f"{policy}: who held devices (darker: more of them, up to {most}; higher: a larger share)", loc="left"
    )
    if len(names) > len(shown):
        axes.text(0.99, 0.01, f"{len(names) - len(shown)} more jobs", transform=axes.transAxes, ha="right")
    axes.invert_yaxis()
    legend = axes.legend(loc="upper right", frameon=False)
    for handle in legend.legend_handles:
        handle.set_alpha(1.0)
    return figure


def _rgb(colour: str) -> tuple[float, float, float]:
    return (int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255)


def _utilisation(summary: Summary, num_devices: int) -> Any:  # noqa: ANN401
    """Devices held by running jobs, and jobs that wait, over time."""
    figure, axes = _figure(4.0)
    held = [
        (time_s, sign * span.share * len(span.placement))
        for span in summary.spans
        for time_s, sign in ((span.begin_s, 1.0), (span.end_s, -1.0))
    ]
    hours, devices = _steps(held)
    axes.fill_between(hours, devices, step="post", color=_COLOURS[0], alpha=0.5, linewidth=0, label="devices held")
    axes.axhline(num_devices, color="#6b6b6b", linewidth=1, linestyle="--", label=f"{num_devices} devices")
    present = [(job.submitted_s, 1.0) for job in summary.jobs]
    present += [(job.ended_s, -1.0) for job in summary.jobs if job.ended_s is not None]
    hours, jobs = _steps(present)
    axes.step(hours, jobs, where="post", color=_COLOURS[1], linewidth=1.2, label="jobs present")
    axes.set(xlabel="hours", ylabel="devices, jobs", ylim=(0, None))
    axes.set_title(f"{summary.policy}: {summary.utilisation:.0%} of the devices held over the makespan", loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, borderaxespad=0.2)
    return figure


def _steps(changes: Sequence[tuple[float, float]]) -> tuple[Any, Any]:
    """Hours and running sums of timed changes."""
    sums: dict[float, float] = {}
    for time_s, change in changes:
        sums[time_s] = sums.get(time_s, 0.0) + change
    times = sorted(sums)
    return np.array(times) / _SECONDS_PER_HOUR, np.cumsum([sums[time_s] for time_s in times])


def _calibration(pairs: Sequence[tuple[float, float]], what: str, policy: str) -> Any:  # noqa: ANN401
    """Predicted against realised on logarithmic axes, with the line where both are equal."""
    figure, axes = _figure(6.0)
    predicted, realised = np.array(pairs).T
    axes.scatter(predicted, realised, s=9, alpha=0.25, color=_COLOURS[0], linewidths=0)
    low, high = min(predicted.min(), realised.min()), max(predicted.max(), realised.max())
    axes.plot([low, high], [low, high], color="#6b6b6b", linewidth=1, label="as predicted")
    for factor in (0.9, 1.1):
        axes.plot([low, high], [low * factor, high * factor], color="#6b6b6b", linewidth=0.7, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel=f"predicted {what}", ylabel=f"realised {what}")
    error = float(np.median(np.abs(predicted / realised - 1)))
    title = f"{policy}: median error {error:.1%} over {len(pairs)} predictions (dotted: 10 %)"
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left", frameon=False)
    return figure


def _shares(found: Replay) -> Any:  # noqa: ANN401
    """The share of each trial that the journal granted, over time."""
    figure, axes = _figure(4.5)
    begin_s = found.decisions[0].now_s if found.decisions else 0.0
    trials = sorted({row.trial_id for decision in found.decisions for row in decision.recorded.allocations})
    for index, trial_id in enumerate(trials):
        points = [
            (decision.now_s - begin_s, 0.0 if row is None else row.settings.share)
            for decision in found.decisions
            for row in (decision.recorded.allocation(trial_id),)
        ]
        seconds, shares = zip(*points, strict=True)
        axes.step(seconds, shares, where="post", color=_COLOURS[index % len(_COLOURS)], label=trial_id)
    axes.set(xlabel="seconds since the first decision", ylabel="share per rank", ylim=(0, 1.05))
    axes.set_title(f"{found.run_id}: shares granted by {found.own_policy}", loc="left")
    if 0 < len(trials) <= 12:
        axes.legend(loc="upper right", frameon=False, fontsize="small")
    return figure
