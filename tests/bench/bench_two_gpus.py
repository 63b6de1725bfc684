"""Several GPUs of one host: ranks over NCCL, trials that share the cards, growth, a killed rank, scaling, a search.

Each part is a process of its own with a time limit, and its result is appended to --out at once; of one that is ended
at its limit, what its run shows so far. `warm` fills the file cache. `alone` leaves the losses that `pair`, `turned`,
`kill` and `grow` are compared with. `probe` tries how two plain ranks find each other over NCCL and notes it for parts
behind it, of which by default there are none. --rehearse runs all of it on cores, over gloo, with a tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.bench import two_gpu_parts as parts
from tests.bench import two_gpu_ways
from tests.bench.card_ranks import RankPlan, train
from tests.bench.part_process import keep, run_for, so_far, tail, worker_logs
from tests.bench.results_file import say

LIMITS_S = {
    "warm": 120.0,
    "alone": 170.0,
    "pair": 260.0,
    "kill": 220.0,
    "grow": 210.0,
    "turned": 150.0,
    "scaling": 200.0,
    "probe": 170.0,
    "ours_fixed": 150.0,
    "ours_all": 150.0,
    "stock_1": 300.0,
    "stock_1/4": 240.0,
}
"""Seconds; two to three times what is expected."""
CLOSING_S = 30.0
"""What an arm of stock gets to start Ray and to end, beside the time budget of its search."""
REHEARSAL_FACTOR = 4.0
LARGE = {"width": 1024, "layers": 13, "heads": 16, "context": 512}
LARGE_MICRO_BATCH = 64
PROFILED_STEPS = 3
SIMPLER = {"sm_groups": "mps", "mps": "time_slice"}
"""How the cards are shared by the parts behind one that failed before its first report."""
WARMED = (
    "torch",
    "torch.distributed.fsdp torch.distributed.checkpoint",
    "ray ray.train.torch ray.tune pandas pyarrow.parquet",
    "orchestrator.driver orchestrator.train.slot orchestrator.jobs.classes",
)
"""Modules, in the order in which `warm` imports them."""
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NCCL_DEBUG": "WARN",
    "PYTHONUNBUFFERED": "1",
}


def warm(given: argparse.Namespace) -> parts.Row:
    """Read from disk once what every process of every part imports; a first `import torch` there takes long."""
    began_s, seconds = time.monotonic(), {}
    for names in WARMED:
        for name in names.split():
            importlib.import_module(name)
        seconds[names] = time.monotonic() - began_s
    import torch

    if torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16):
            layer = torch.nn.Linear(512, 512, device="cuda", dtype=dtype)
            layer(torch.ones(64, 512, device="cuda", dtype=dtype)).sum().backward()
        torch.cuda.synchronize()
        seconds["cuda"] = time.monotonic() - began_s
    return {"seconds_until": seconds}


def probe(given: argparse.Namespace) -> parts.Row:
    """The first way in which two ranks train: under MPS, while SM groups change; then without."""
    keep_so_far = partial(keep, given, "probe, so far")
    return two_gpu_ways.probe(given.directory, _passed_on(given), _factor(given), keep_so_far)


def alone(given: argparse.Namespace) -> parts.Row:
    """One trial of two ranks, undisturbed: the losses of all others."""
    done = _run("alone", given)
    losses = done.losses("trial-00000")
    (given.directory / "alone.json").write_text(json.dumps(losses))
    return {**parts.facts(done), "losses": [round(loss, 5) for _, loss in sorted(losses.items())]}


def pair(given: argparse.Namespace) -> parts.Row:
    """Two trials of two ranks on both cards, whose share, batch and tier turn while they run."""
    done = _run("pair", given)
    reference, (_, tolerance) = _reference(given), _scale(given).tolerance
    return {
        **parts.facts(done),
        **parts.turns(done),
        "overlap_s": parts.overlap_s(done),
        "against_alone": {
            trial: parts.compare(done.losses(trial), reference, tolerance) for trial in ("trial-00000", "trial-00001")
        },
    }


def turned(given: argparse.Namespace) -> parts.Row:
    """The same turns of a trial that has both cards to itself; and `pair` against it."""
    done = _run("turned", given)
    losses, (_, tolerance) = done.losses("trial-00000"), _scale(given).tolerance
    found = {**parts.facts(done), **parts.turns(done)}
    found["against_alone"] = parts.compare(losses, _reference(given), tolerance)
    before = parts.Run(given.directory / "pair" / "pair", 0, 0.0, "", {})
    if before.directory.exists():
        trials = ("trial-00000", "trial-00001")
        found["pair_against_turned"] = {name: parts.compare(before.losses(name), losses, tolerance) for name in trials}
    return found


def kill(given: argparse.Namespace) -> parts.Row:
    """Two trials beside each other; one rank of the first is killed."""
    done = _run("kill", given, parts.kill_a_rank)
    reference, (tolerance, _) = _reference(given), _scale(given).tolerance
    return {
        **parts.facts(done),
        **parts.kill_facts(done),
        "against_alone": {
            trial: parts.compare(done.losses(trial), reference, tolerance) for trial in ("trial-00000", "trial-00001")
        },
    }


def grow(given: argparse.Namespace) -> parts.Row:
    """A trial of one rank that grows to two, and back."""
    done = _run("grow", given)
    losses, (tolerance, _) = done.losses("trial-00000"), _scale(given).tolerance
    return {
        **parts.facts(done),
        **parts.grow_facts(done),
        "against_alone": parts.compare(losses, _reference(given), tolerance),
    }


def scaling(given: argparse.Namespace) -> parts.Row:
    """Tokens/s of a large model on one card and on two in the same step mode, and of the best loops for one card."""
    params, micro_batch, steps = (LARGE, LARGE_MICRO_BATCH, 25)
    if given.rehearse:
        params, micro_batch, steps = {**parts.REHEARSAL.params, "width": 64}, 8, 5
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(given.directory / "nccl.%p")}
    forms = {
        "one wrapped": (1, True, False, micro_batch),
        "two": (2, False, False, micro_batch),
        "one plain": (1, False, False, micro_batch),
        "two, parameters held": (2, False, True, micro_batch),
        "one wrapped, parameters held": (1, True, True, micro_batch),
        "one wrapped, one window": (1, True, False, 1),  # the device has next to nothing to do: the host's time
        "two, one window": (2, False, False, 1),
    }
    found: parts.Row = {"params": params, "micro_batch_per_rank": micro_batch, "tier": "bf16"}
    num_cards = 2 if given.rehearse else _num_cards()
    for name, (world_size, is_wrapped, is_held, num_windows) in forms.items():
        if world_size > num_cards:
            found[name] = f"not run, there are {num_cards} cards"
            continue
        plan = _plan(given, params, num_windows, "bf16", world_size, steps)
        ranks = train(replace(plan, is_wrapped=is_wrapped, holds_parameters=is_held, profiled_steps=PROFILED_STEPS))
        median_s, mean_s = (max(rank[f"{kind}_step_s"] for rank in ranks) for kind in ("median", "mean"))
        found[name] = {
            "micro_batch": num_windows,
            "tokens_per_s": num_windows * params["context"] * world_size / median_s,
            "tokens_per_s_of_mean": num_windows * params["context"] * world_size / mean_s,
            "step_ms": [[round(1e3 * each, 3) for each in rank["step_s"]] for rank in ranks],
            "losses": ranks[0]["losses"][:10],
            "cards": [rank["card"] for rank in ranks],
            "peak_bytes": [rank["peak_bytes"] for rank in ranks],
            "num_parameters": ranks[0]["num_parameters"],
            "profile_ms": [rank["profile"] for rank in ranks],
        }
        say(f"{name}: {found[name]['tokens_per_s']:.0f} tokens/s")
        keep(given, "scaling, so far", found)  # each form is a finding of its own
    found["nccl"] = sorted({line for log in given.directory.glob("nccl.*") for line in two_gpu_ways.transport(log)})
    if num_cards > 1:
        found["ratio"] = found["two"]["tokens_per_s"] / found["one wrapped"]["tokens_per_s"]
        found["ratio_of_means"] = found["two"]["tokens_per_s_of_mean"] / found["one wrapped"]["tokens_per_s_of_mean"]
    if not given.rehearse:
        found["best loop, one card, tokens/s"] = _best_loop(params, micro_batch)
    if num_cards > 1 and not given.rehearse:
        found["two to the best loop of one card"] = (
            found["two"]["tokens_per_s"] / found["best loop, one card, tokens/s"]
        )
    return found


def _num_cards() -> int:
    import torch

    return torch.cuda.device_count()


def _best_loop(params: parts.Row, micro_batch: int) -> float:
    """The hand-written loop on the first card: bf16, the whole step one graph."""
    from tests.bench import gpu_job

    gpu_job.SIZES["168M"] = params, micro_batch
    loop = gpu_job.BestLoop("168M", "bf16")
    loop.run(5)
    return float(micro_batch * params["context"] / min(loop.run(10) for _ in range(3)))


PARTS: dict[str, Callable[[argparse.Namespace], parts.Row]] = {
    "warm": warm,
    "probe": probe,
    "alone": alone,
    "pair": pair,
    "scaling": scaling,
    "grow": grow,
    "kill": kill,
    "turned": turned,
}
DEFAULT = ("alone", "pair", "kill", "grow", "turned", "scaling", "probe")


def _factor(given: argparse.Namespace) -> float:
    """How much longer everything may take."""
    return REHEARSAL_FACTOR if given.rehearse else 1.0


def _scale(given: argparse.Namespace) -> parts.Scale:
    return parts.REHEARSAL if given.rehearse else parts.ON_GPUS


def _run(part: str, given: argparse.Namespace, watch: Callable[[Path], parts.Row | None] | None = None) -> parts.Run:
    return parts.run(part, _scale(given), given.directory / part, _chosen(given)[0], watch)


def _reference(given: argparse.Namespace) -> dict[int, float]:
    """The losses that `alone` left; none where it did not end."""
    with contextlib.suppress(OSError):
        losses = json.loads((given.directory / "alone.json").read_text())
        return {int(step): float(loss) for step, loss in losses.items()}
    return {}


def _chosen(given: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """How cards are shared and what NCCL is told, as `probe` found it."""
    with contextlib.suppress(OSError):
        gpu_share, environment = json.loads((given.directory / "chosen.json").read_text())
        return gpu_share, environment
    return "sm_groups", {}


def _plan(
    given: argparse.Namespace, params: parts.Row, micro_batch: int, tier: str, world_size: int, num_steps: int
) -> RankPlan:
    return RankPlan(
        directory=given.directory,
        params=parts.REHEARSAL.params if given.rehearse else params,
        micro_batch=micro_batch,
        tier=tier,
        world_size=world_size,
        num_steps=num_steps,
        device="cpu" if given.rehearse else "cuda",
    )


def _passed_on(given: argparse.Namespace) -> list[str]:
    """The arguments of a process that does one part."""
    arguments = ["--out", str(given.out), "--directory", str(given.directory)]
    return [*arguments, "--rehearse"] if given.rehearse else arguments


def do(part: str, given: argparse.Namespace, left_s: float) -> None:
    """One part in a process of its own; what came of it, or how it was ended, is in the results."""
    limit_s = min(LIMITS_S[part] * _factor(given), left_s)
    log, began_s = given.directory / f"{part.replace('/', '-')}.log", time.monotonic()
    command = [sys.executable, "-m", "tests.bench.bench_two_gpus", "--only", part, *_passed_on(given)]
    if part not in PARTS:
        shutil.rmtree(given.directory / "search" / part.replace("/", "-"), ignore_errors=True)
        # Stock ends by itself in time; ours is ended from here, with all that it has started.
        command = _search_command(part, given, limit_s + (-CLOSING_S if part.startswith("stock") else CLOSING_S))
    gpu_share, environment = _chosen(given)
    evidence: parts.Row = {}
    code = run_for(
        command, limit_s, log, ENVIRONMENT | environment, lambda: evidence.update(_so_far(part, given), at="its limit")
    )
    seconds = time.monotonic() - began_s
    say(f"{part}: exit code {code} after {seconds:.0f} s")
    if code != 0:
        words = f"not ended within its limit of {limit_s:.0f} s" if code is None else f"exit code {code}"
        row = {"failed": words, "gpu_share": gpu_share, "seconds": seconds, "log": tail(log, 4000)}
        evidence = evidence or _so_far(part, given)
        keep(given, part, row | {"so_far": evidence})
        if part in {"alone", "pair", "kill"} and gpu_share in SIMPLER and not evidence.get("results"):
            (given.directory / "chosen.json").write_text(json.dumps([SIMPLER[gpu_share], environment]))


def _so_far(part: str, given: argparse.Namespace) -> parts.Row:
    """What a part that is about to be ended leaves: what its run shows, and its losses against those of `alone`."""
    directory = given.directory / ("search" if part not in PARTS else part) / part
    found: parts.Row = {**so_far(directory), "worker_logs": worker_logs()}
    run = parts.Run(directory, 0, 0.0, "", {})
    try:
        losses = (
            {e["trial_id"]: run.losses(e["trial_id"]) for e in run.entries("trial_queued")}
            if directory.exists()
            else {}
        )
        if part == "alone" and losses.get("trial-00000"):
            (given.directory / "alone.json").write_text(json.dumps(losses["trial-00000"]))
        elif part in PARTS:
            reference, (_, tolerance) = _reference(given), _scale(given).tolerance
            found["against_alone"] = {
                trial: parts.compare(each, reference, tolerance) for trial, each in losses.items()
            }
    except Exception:  # there may be no steps yet
        found["no_losses"] = traceback.format_exc()[-600:]
    return found


def _search_command(part: str, given: argparse.Namespace, timeout_s: float) -> list[str]:
    """An arm of the search of `bench_gpu_search`, on both cards."""
    arguments = ["--arm", part, "--cards", "2", "--steps", str(given.search_steps), "--out", str(given.out)]
    arguments += ["--directory", str(given.directory / "search"), "--timeout", f"{timeout_s:.0f}"]
    return [sys.executable, "-m", "tests.bench.bench_gpu_search", *arguments, *(["--rehearse"] * given.rehearse)]


def main() -> None:
    """Run the parts that are asked for, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--directory", type=Path, default=Path("/tmp/two-gpus"), help="for runs and their logs")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS_S), default=list(DEFAULT))
    parser.add_argument("--budget", type=float, default=1e6, help="seconds after which no further part begins")
    parser.add_argument("--end", type=float, default=1e6, help="seconds after which a part that runs is ended")
    parser.add_argument("--search-steps", type=int, default=300)
    parser.add_argument("--rehearse", action="store_true", help="on cores, over gloo, with a tiny model")
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    if given.way:
        plan = _plan(given, parts.ON_GPUS.params, 16, "fp32", 2, 25)
        two_gpu_ways.try_way(given.way, plan, _factor(given))
        return
    if given.only:
        try:
            row = PARTS[given.only](given)
            keep(given, given.only, row)
            sys.exit(1 if row.get("exit_code") else 0)
        except Exception:
            say(traceback.format_exc())
            raise
        return
    began_s = time.monotonic()
    is_warm = (given.directory / "warm.log").exists()  # a directory of this machine, so it has been read before
    for part in [*([] if is_warm else ["warm"]), *given.parts]:
        passed_s = time.monotonic() - began_s
        if passed_s > min(given.budget, given.end - 10):
            say(f"{part}: not begun, the time is used up")
            continue
        shutil.rmtree(given.directory / part, ignore_errors=True)
        do(part, given, given.end - passed_s)


if __name__ == "__main__":
    main()
