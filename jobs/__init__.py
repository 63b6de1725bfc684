"""What is trained: models with their data and loss. Knows nothing of Ray, plans or shares.

Importing this package does not import torch: the table and its checks are plain Python, and `build_job` loads the
classes when it is first called. The orchestrator's run-file checker uses the former, its workers the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.own import is_own, load
from orchestrator.jobs.table import JOB_INFO, JobInfo, check_param, complete_params, job_info

if TYPE_CHECKING:
    from orchestrator.jobs.job import Job

__all__ = ["JOB_INFO", "JobInfo", "JobKey", "build_job", "check_param", "complete_params", "job_info"]


def build_job(job: str, params: Mapping[str, object]) -> Job:
    """Build a job from its name and parameters; those not given take their defaults.

    Raises:
        ValueError: unknown job or parameter, wrong type, out of range, or values that do not go together.
    """
    complete = complete_params(job, params)
    if is_own(job):
        return _build_own(job, complete)
    from orchestrator.jobs.classes import JOBS

    return JOBS[job](**complete)


def _build_own(job: str, params: Mapping[str, object]) -> Job:
    """A training named by import path: an object of that class, or what makes one of a library's model."""
    key, kind = JobKey.of(job), job_info(job).kind
    built: Any
    if kind == "lightning":
        from orchestrator.jobs.lightning_model import LightningTraining

        built = LightningTraining(key, params)
    elif kind == "huggingface":
        from orchestrator.jobs.huggingface_model import HuggingFaceTraining

        built = HuggingFaceTraining(key, params)
    else:
        built = load(job)(**params)
    return built  # type: ignore[no-any-return]
