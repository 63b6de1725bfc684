"""One trial of a job's search file in one process without Ray, with every dial turning or with none.

`python -m tests.bench.job_twin JOB SEED still|turning [a.b=value ...] [lr=value]` prints one line of JSON. The training
loop is the real one and orders come from a script, so that two trials of one seed differ in nothing but the turning. A
share is told to the loop but not enforced: it changes how long a step takes, never what it computes. Used by
`bench_jobs`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tests.bench.results_file import ROOT

NUM_TURNS = 24
"""Turns of a trial, spread evenly over its steps."""


def search_file(job: str) -> Path:
    """The run file of a job's search."""
    return ROOT / "jobs" / "searches" / f"{job}.yaml"


def train(job: str, seed: int, *, turns: bool, overrides: list[str], directory: Path) -> dict[str, Any]:
    """Train a trial of the search file, in the middle of the learning rates that it searches, to its end."""
    import torch

    from orchestrator.config import load_config
    from orchestrator.control.orders import Grant, Outcome, SlotOp, SlotOrder, Status, StopMode, TrialOrder
    from orchestrator.jobs import build_job
    from orchestrator.policies.plan import TrialId
    from orchestrator.run_spec import run_spec
    from tests.unit.orchestrator.train.links import Script, loop

    resolved = load_config(search_file(job), [each for each in overrides if not each.startswith("lr=")])
    spec, space = run_spec(resolved), resolved.config.search.one_space
    bounds = space["lr"].loguniform
    assert bounds is not None, "every search file searches the learning rate so"
    given = [float(each[3:]) for each in overrides if each.startswith("lr=")]
    params = dict(spec.params) | {"lr": given[0] if given else math.sqrt(bounds[0] * bounds[1])}
    trial = TrialOrder(
        trial_id=TrialId("t"),
        attempt=0,
        seed=seed,
        job=job,
        params=params,
        start=spec.start,
        limits=spec.limits,
        samples_per_report=spec.samples_per_report,
        max_reports=spec.max_reports,
        directory=str(directory / "run" / "trials" / "t"),
        resume_from=None,
        num_reports_done=0,
        probe_budget=spec.probe_budget if turns else 0.0,
    )
    if not turns:
        trial = replace(trial, limits=replace(trial.limits, tiers=trial.limits.tiers[:1]))
    first = Grant(generation=1, settings=trial.start, units=((0,),), amount=1.0)
    script = Script(
        SlotOrder(incarnation="i", seq=1, op=SlotOp.RUN, trial=trial, grant=first, credit=10**6, stop=StopMode.NONE)
    )
    if turns:
        # Told early enough that all turns are made, however many steps the turned batches make of the samples.
        num_steps = spec.target_samples // trial.start.global_batch
        for number, changes in enumerate(islice(_turns(trial.start.micro_batch), NUM_TURNS)):
            script.at(int(0.75 * num_steps * (number + 1) / NUM_TURNS), partial(_granted, number=number, **changes))
    torch.manual_seed(seed)
    built = build_job(job, params)
    built.prepare()
    prepared_s = time.monotonic()
    outcome: Outcome = loop(script, built).run()
    script.collect()
    assert outcome.status is Status.DONE, outcome
    assert len(script.acks) == 1 + (NUM_TURNS if turns else 0), "every turn was applied"
    return {
        "seed": seed,
        "turns": turns,
        "reports": [{"samples": each.num_samples, "step": each.step, **each.metrics} for each in script.reports],
        "overrides": [each.reason for each in script.overrides],
        "num_epochs": outcome.num_samples / built.num_train_samples,
        "training_s": time.monotonic() - prepared_s,
    }


def _turns(micro_batch: int) -> Iterator[dict[str, Any]]:
    """Changes against the start, over and over: every dial goes there and back, the global batch to twice and half."""
    from orchestrator.policies.tier import Tier

    half, twice = max(1, micro_batch // 2), 2 * micro_batch
    while True:
        yield {"share": 0.25}
        yield {"micro_batch": half, "grad_accum": 2}
        yield {"tier": Tier.BF16}
        yield {"micro_batch": twice}
        yield {"share": 1.0}
        yield {"tier": Tier.BF16, "micro_batch": half, "grad_accum": 2}
        yield {"micro_batch": half}
        yield {}


def _granted(now: Any, number: int, **changes: Any) -> Any:
    """The order with the next grant in it."""
    grant = now.grant
    return replace(now, grant=replace(grant, generation=number + 2, settings=replace(now.trial.start, **changes)))


def main() -> None:
    """Train what the command line says and print how it went."""
    import torch

    job, seed, kind, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        found = train(job, int(seed), turns=kind == "turning", overrides=overrides, directory=Path(directory))
    found["cpu_s"] = time.process_time()  # of the whole process, imports included
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
