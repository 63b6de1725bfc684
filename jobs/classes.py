"""The class of every job, by name. Imports torch; `jobs.table` has the same names without it.

Used by `build_job`; adding a job takes one line here and one row in `jobs.table.JOB_INFO`.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.jobs.genome import GenomeJob
from orchestrator.jobs.image import ImageJob
from orchestrator.jobs.job import Job
from orchestrator.jobs.language import LanguageJob
from orchestrator.jobs.mlp import MlpJob
from orchestrator.jobs.speech import SpeechJob
from orchestrator.jobs.tissue import TissueJob

JOBS: dict[str, Callable[..., Job]] = {
    "language": LanguageJob,
    "image": ImageJob,
    "tissue": TissueJob,
    "speech": SpeechJob,
    "genome": GenomeJob,
    "mlp": MlpJob,
}
