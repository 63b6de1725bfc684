"""Users' functions on a GPU: losses while their share turns, what seeing them from outside costs, and real searches.

Each part is a process of its own with a limit; its result is one line of JSON, appended to --out at once:

- `losses_gpt2`, `losses_resnet`: a function under the driver, undisturbed twice and with its SM groups turned live.
- `watched`: a function with the line `orchestrator.watch` whose tier is turned to bf16 and fp8: which tiers calibration
  and probes found fast and safe, seconds per step in each, and its losses against the same function undisturbed.
- `overhead`: seconds per step under the driver against the same loop alone, in pairs that alternate in one process.
- `search_gpt2`, `search_resnet`: four trials at a time on one GPU with every dial on; shares as the checks of the run
  saw them, changes of each dial, and what `verify` found.

--rehearse runs all of it on cores with tiny models.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import share_runs
from tests.bench.part_process import Row
from tests.bench.part_runner import REHEARSAL_FACTOR, Part, main_of

LIMITS_S = {
    "losses_gpt2": 100.0,
    "losses_resnet": 100.0,
    "watched": 120.0,
    "overhead": 150.0,
    "search_gpt2": 200.0,
    "search_resnet": 200.0,
}
DEFAULT = tuple(LIMITS_S)
STEPS, TURN_EVERY = 80, 10
BATCHES = {"gpt2": 16, "resnet": 64}
"""Of the trainings' own DataLoaders: the batch is not turned here."""
PAIRS, PAIR_STEPS = 30, 12
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"lr": 3e-4, "width": 384, "layers": 6, "context": 128},
    "resnet": {"lr": 0.05, "width": 32},
}
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"lr": 3e-4, "width": 24, "layers": 1, "context": 16, "samples": 512},
    "resnet": {"lr": 0.05, "width": 4, "samples": 512},
}


def params_of(kind: str, given: argparse.Namespace) -> dict[str, Any]:
    return dict((TINY if given.rehearse else SIZES)[kind])


def driven(kind: str, params: dict[str, Any], folder: Path, share: Any, turns: list[tuple[int, ...]]) -> list[float]:
    """The losses of a function under the driver; its units are turned every so many steps."""
    import torch

    from orchestrator.train.boundary import Boundary
    from orchestrator.train.function import reports
    from orchestrator.train.function.driver import FunctionDriver
    from orchestrator.train.groups import Ranks
    from tests.bench import function_trainings
    from tests.unit.orchestrator.train.links import Script, grant, order

    reports.install()
    first = order(folder, credit=10**9)
    assert first.trial is not None
    trial = replace(first.trial, metric="loss", job="tests.bench.function_trainings:gpt2", max_reports=10**6)
    first = replace(first, trial=trial)
    batch = BATCHES[kind]
    if turns:
        begun = replace(grant(1, micro_batch=batch), units=(turns[0],), amount=float(len(turns[0])))
        first = replace(first, grant=begun)
    script = Script(first)
    for number, units in enumerate(turns[1:]):
        new = replace(grant(number + 2, micro_batch=batch), units=(units,), amount=float(len(units)))
        script.at(TURN_EVERY * (number + 1), lambda now, new=new: replace(now, grant=new))  # type: ignore[misc]
    boundary = Boundary(script, 0, 1, None)
    newest = boundary.cross()
    assert newest is not None
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = {**params, "losses": []}
    function: Callable[[dict[str, Any]], None] = getattr(function_trainings, kind)
    ranks = Ranks(rank=0, world_size=1, device=device)
    FunctionDriver(newest, lambda: function(config), ranks, boundary, script, share).run()
    assert (script.records["switch_s"] > 0).sum() >= max(0, len(turns) - 1)
    losses: list[float] = config["losses"]
    return losses


def losses(kind: str, given: argparse.Namespace) -> Row:
    """Largest relative difference of any step's loss: between two undisturbed runs, and with the share turned live."""
    from orchestrator.share.sm_groups import SmGroups
    from tests.unit.orchestrator.train.links import FakeShare

    params = {**params_of(kind, given), "steps": STEPS, "reports": 1}
    share: Any = FakeShare() if given.rehearse else SmGroups()
    count = 8 if given.rehearse else share.num_units
    generator = random.Random(0)
    sizes = [generator.randint(1, count) for _ in range(STEPS // TURN_EVERY)]
    turns = [tuple(sorted(generator.sample(range(count), size))) for size in sizes]
    folder = given.directory / f"driven-{kind}"
    still = [driven(kind, params, folder / str(each), FakeShare(), []) for each in range(2)]
    turned = driven(kind, params, folder / "turned", share, turns)
    share.release()

    def worst(one: list[float], other: list[float]) -> float:
        return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(one, other, strict=True))

    return {
        "kind": kind,
        "params": params,
        "num_turns": len(turns),
        "groups": [len(units) for units in turns],
        "still_against_still": worst(*still),
        "turned_against_still": worst(still[0], turned),
        "losses": {"still": still, "turned": turned},
    }


def watched(given: argparse.Namespace) -> Row:
    """Tiers of a watched function: what was found of each, steps in each, and losses against those undisturbed."""
    import statistics

    from orchestrator.policies.tier import Tier
    from orchestrator.telemetry.record import tier_of

    steps = 60 if given.rehearse else 400
    params = {
        "lr": 1e-4,
        "steps": steps,
        "reports": 1,
        **({"width": 32, "depth": 2, "samples": 512} if given.rehearse else {}),
    }
    ladder = (Tier.FP32, Tier.BF16, Tier.INT8) if given.rehearse else (Tier.FP32, Tier.TF32, Tier.BF16, Tier.FP8)
    folder = given.directory / "watched"
    turns = {steps // 4: ladder[-2], steps // 2: ladder[-1], 3 * steps // 4: ladder[0]}
    plain, _ = _watched(params, folder / "still", ladder, {})
    losses, script = _watched(params, folder / "turned", ladder, turns)
    records = script.records
    seconds = {
        str(tier_of(int(code))): statistics.median(records["step_s"][records["tier"] == code].tolist())
        for code in sorted(set(records["tier"].tolist()))
    }
    tail = steps // 10
    return {
        "ladder": [str(tier) for tier in ladder],
        "found": [
            {
                "tier": str(fit.tier),
                "is_safe": fit.is_safe,
                "is_real": fit.is_real,
                "step_s": fit.step_s,
                "noise_ratio": fit.noise_ratio,
            }
            for fit in script.tiers[-1].tiers
        ],
        "spent_s": script.tiers[-1].spent_s,
        "step_s": seconds,
        "overrides": [override.reason for override in script.overrides],
        "num_layers": [fit.num_in_tier for fit in script.tiers[-1].tiers],
        "last_losses": {"still": statistics.mean(plain[-tail:]), "turned": statistics.mean(losses[-tail:])},
        "first_losses_equal": losses[: steps // 5] == plain[: steps // 5],
    }


def _watched(params: dict[str, Any], folder: Path, ladder: Any, turns: dict[int, Any]) -> tuple[list[float], Any]:
    import torch

    from orchestrator.train.boundary import Boundary
    from orchestrator.train.function import reports
    from orchestrator.train.function.driver import FunctionDriver
    from orchestrator.train.groups import Ranks
    from tests.bench import function_trainings
    from tests.unit.orchestrator.train.links import FakeShare, Script, grant, order

    reports.install()
    first = order(folder / "runs" / "r" / "trials" / "t", credit=10**9)
    assert first.trial is not None
    limits = replace(first.trial.limits, tiers=ladder)
    trial = replace(first.trial, metric="loss", max_reports=10**6, limits=limits, probe_budget=0.05)
    script = Script(replace(first, trial=trial))
    for number, (step, tier) in enumerate(turns.items()):
        new = grant(number + 2, micro_batch=256, tier=tier)
        script.at(step, lambda now, new=new: replace(now, grant=new))  # type: ignore[misc]
    boundary = Boundary(script, 0, 1, None)
    newest = boundary.cross()
    assert newest is not None
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = {**params, "losses": []}
    ranks = Ranks(rank=0, world_size=1, device=device)
    FunctionDriver(newest, lambda: function_trainings.linear_stack(config), ranks, boundary, script, FakeShare()).run()
    return config["losses"], script


def overhead(given: argparse.Namespace) -> Row:
    """Seconds per step alone over seconds per step under the driver, of pairs that alternate in one process."""
    from tests.bench import function_trainings
    from tests.unit.orchestrator.train.links import FakeShare

    params = params_of("gpt2", given)
    if not given.rehearse:
        params |= {"width": 768, "layers": 12}  # some 20 ms a step
    params |= {"steps": PAIR_STEPS, "reports": 1, "samples": 512}
    folder = given.directory / "driven-overhead"
    seconds: dict[str, list[float]] = {"alone": [], "driven": []}
    for number in range(PAIRS + 1):
        for way in ("alone", "driven") if number % 2 else ("driven", "alone"):
            marks: list[float] = []
            timed = dict(params, marks=marks)
            if way == "alone":
                function_trainings.timed_gpt2(timed)
            else:
                _drive_timed(timed, folder / str(number), FakeShare())
            if number:  # the first pair warms up
                seconds[way].append(marks[-1] / PAIR_STEPS)
    ratios = [a / b for a, b in zip(seconds["alone"], seconds["driven"], strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "step_s": {way: statistics.median(values) for way, values in seconds.items()},
        "ratio_median": statistics.median(ratios),
        "ratio_lower": medians[50],
        "ratios": ratios,
    }


def _drive_timed(config: dict[str, Any], folder: Path, share: Any) -> None:
    import torch

    from orchestrator.train.boundary import Boundary
    from orchestrator.train.function import reports
    from orchestrator.train.function.driver import FunctionDriver
    from orchestrator.train.groups import Ranks
    from tests.bench import function_trainings
    from tests.unit.orchestrator.train.links import Script, order

    reports.install()
    first = order(folder, credit=10**9)
    assert first.trial is not None
    script = Script(replace(first, trial=replace(first.trial, metric="loss", max_reports=10**6)))
    boundary = Boundary(script, 0, 1, None)
    newest = boundary.cross()
    assert newest is not None
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ranks = Ranks(rank=0, world_size=1, device=device)
    FunctionDriver(newest, lambda: function_trainings.timed_gpt2(config), ranks, boundary, script, share).run()


def search(kind: str, given: argparse.Namespace) -> Row:
    """A real search of that function, every dial on: checks of shares, changes of dials, and what `verify` found."""
    from orchestrator.run_dirs import read_status
    from orchestrator.view.verify import verify

    reports, steps = (2, 60) if given.rehearse else (4, 600)
    params = {**params_of(kind, given), "steps": steps, "reports": reports}
    rate = params.pop("lr")
    file: Row = {
        "name": f"functions-{kind}",
        "storage": str(given.directory / "runs"),
        "seed": 1,
        "job": {
            "name": f"tests.bench.function_trainings:{kind}",
            "params": params,
            "import_paths": [str(Path(__file__).parents[2])],
        },
        "search": {
            "metric": "loss",
            "mode": "min",
            "space": {"lr": {"choice": [rate, rate * 1.1, rate * 0.9, rate * 1.2]}},
            "num_trials": 2 if given.rehearse else 4,
            "max_concurrent": 2 if given.rehearse else 4,
        },
        "dials": {"precision": {"tiers": ["fp32", "bf16"]}, "batch": {"max_global": 256, "max_micro": 256}},
        "policy": {"name": "goodput"},
        "devices": {"use": "cpu"} if given.rehearse else {"use": "gpu", "gpu_share": "sm_groups"},
    }
    row = share_runs.run(
        file, train_s=None, limit_s=LIMITS_S[f"search_{kind}"] * (REHEARSAL_FACTOR if given.rehearse else 1.0) - 30.0
    )
    directory = Path(row["directory"])
    status = read_status(directory) or {}
    found = verify(directory)
    return {
        **row,
        "kind": kind,
        "state": status.get("state"),
        "dials": status.get("dials"),
        "trials": [
            {
                key: trial.get(key)
                for key in ("trial_id", "state", "metric_value", "step", "enforced_by", "off", "checks")
            }
            for trial in status.get("trials", [])
        ],
        "shares": _shares(directory),
        "violations": [str(each) for each in found["violations"]],
        "notes": [str(each) for each in found["notes"]],
    }


def _shares(directory: Path) -> list[Row]:
    """Median step time of each trial by share, tier and batch, of settled steps."""
    from orchestrator.telemetry.load import load_run
    from orchestrator.telemetry.record import FLAG_APPLIED, FLAG_UNSETTLED

    steps = load_run(directory).to_pandas("steps")
    steps = steps[(steps["flags"] & (FLAG_APPLIED | FLAG_UNSETTLED)) == 0]
    grouped = steps.groupby(["trial_id", "share", "tier", "micro_batch"], observed=True)["step_s"]
    rows: list[Row] = json.loads(grouped.agg(["median", "count"]).reset_index().to_json(orient="records"))
    return rows


PARTS: dict[str, Part] = {
    "losses_gpt2": partial(losses, "gpt2"),
    "losses_resnet": partial(losses, "resnet"),
    "watched": watched,
    "overhead": overhead,
    "search_gpt2": partial(search, "gpt2"),
    "search_resnet": partial(search, "resnet"),
}

if __name__ == "__main__":
    main_of("tests.bench.bench_functions", PARTS, LIMITS_S, default=DEFAULT, doc=__doc__)
