"""Workloads made up from published statistics, by seed: Philly-like and Helios-like.

Only what the sources say is imitated: the mix of sizes, when jobs come, how many end early. Both draw jobs of the
applications they are given. The same seed gives the same workload for ever: `random.Random` is specified to.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from orchestrator.policies.simulator.application import Applications
from orchestrator.policies.simulator.workload import Submission, Workload

PHILLY_MIX = (
    ("cifar10", 0.36),
    ("ncf", 0.36),
    ("deepspeech2", 0.10),
    ("bert", 0.10),
    ("yolov3", 0.06),
    ("imagenet", 0.02),
)
"""Applications by their part of all jobs. Source: Pollux (OSDI 2021), table 1: small 72 %, medium 20 %, large 6 %,
extra large 2 %, the classes of GPU time of the Philly trace (ATC 2019)."""
PHILLY_HOURS = (1.0, 0.9, 0.9, 1.2, 1.6, 1.7, 1.1, 0.9)
"""Submissions in each of eight day hours relative to the first: a peak before the middle of the day. Source: the eight
workloads published with the Pollux simulator."""
_HELIOS_MEDIAN_S, _HELIOS_MEAN_S = 206.0, 6652.0
_HELIOS_WORKERS = ((1, 0.55), (2, 0.12), (4, 0.12), (8, 0.14), (16, 0.04), (32, 0.02), (64, 0.01))
_HELIOS_COMPLETED = 0.624
"""Source: Hu et al., Characterization and Prediction of Deep Learning Workloads (SC 2021, arXiv 2109.01313): mean and
median of GPU jobs, more than half of them on one GPU, those of eight and more a few percent, 62.4 % run to the end."""


def philly_like(applications: Applications, *, seed: int, num_jobs: int = 160, hours: float = 8.0) -> Workload:
    """Jobs of the Pollux mix over so many hours, with the requests their users tuned.

    Raises:
        KeyError: an application of the mix is missing.
    """
    rng = random.Random(f"philly-{seed}")
    jobs = []
    for _ in range(num_jobs):
        application = applications[_pick(rng, PHILLY_MIX)]
        hour = rng.choices(range(len(PHILLY_HOURS)), PHILLY_HOURS)[0]
        time_s = (hour + rng.random()) / len(PHILLY_HOURS) * hours * 3600
        num_replicas, batch_size = rng.choice(application.requests)
        jobs.append((float(int(time_s)), application.name, num_replicas, batch_size))
    return _named(sorted(jobs))


def helios_like(applications: Applications, *, seed: int, num_jobs: int = 1000, hours: float = 24.0) -> Workload:
    """Many short jobs on one device and few long ones on many, some of which end early.

    A job's GPU time is log-normal; it becomes a job of the application whose usual GPU time is nearest to it, of the
    length that takes that time. Users ask for a batch in proportion to their workers.
    """
    rng = random.Random(f"helios-{seed}")
    sigma = math.sqrt(2 * math.log(_HELIOS_MEAN_S / _HELIOS_MEDIAN_S))
    usual = {name: application.alone_s(1, 1) for name, application in sorted(applications.items())}
    jobs = []
    for index in range(num_jobs):
        time_s = float(int(rng.random() * hours * 3600))
        duration_s = min(30 * 24 * 3600.0, rng.lognormvariate(math.log(_HELIOS_MEDIAN_S), sigma))
        workers = rng.choices([n for n, _ in _HELIOS_WORKERS], [p for _, p in _HELIOS_WORKERS])[0]
        device_s = max(10.0, duration_s) * workers
        name = min(usual, key=lambda each: (abs(math.log(usual[each] / device_s)), each))
        application = applications[name]
        workers = min(workers, application.max_workers)
        batch = min(application.max_batch, application.base_batch * workers)
        stops_at = 1.0 if rng.random() < _HELIOS_COMPLETED else max(0.02, rng.random())
        jobs.append((time_s, index, name, workers, batch, device_s / usual[name], stops_at))
    return tuple(
        Submission(
            name=f"{name}-{number}",
            time_s=time_s,
            application=name,
            num_replicas=workers,
            batch_size=batch,
            user=f"user-{number % 37}",
            length=length,
            stops_at=stops_at,
        )
        for number, (time_s, _, name, workers, batch, length, stops_at) in enumerate(sorted(jobs))
    )


def _named(jobs: Sequence[tuple[float, str, int, int]]) -> Workload:
    return tuple(
        Submission(
            name=f"{application}-{number}",
            time_s=time_s,
            application=application,
            num_replicas=num_replicas,
            batch_size=batch_size,
        )
        for number, (time_s, application, num_replicas, batch_size) in enumerate(jobs)
    )


def _pick(rng: random.Random, mix: Sequence[tuple[str, float]]) -> str:
    return rng.choices([name for name, _ in mix], [part for _, part in mix])[0]
