"""The learning-rate schedule of a trial, from its order."""

from __future__ import annotations

from orchestrator.control.orders import TrialOrder
from orchestrator.jobs import job_info
from orchestrator.train.batch.learning_rate import ScalingRule, Schedule, Shape

WARMUP_STEPS = 20
RAMP_STEPS = 50
"""Steps at the start batch over which a larger batch brings in its larger learning rate (50-100 in practice)."""

# A job names the rule of its optimizer; AdaScale is the linear one as long as noise prevails, and less beyond that.
_RULES = {"sqrt": ScalingRule.SQRT, "linear": ScalingRule.ADASCALE}


def schedule_of(order: TrialOrder, base_lr: float) -> Schedule:
    """Constant after a short warm-up; a larger batch brings its larger rate in over some steps of its own."""
    total = order.samples_per_report * order.max_reports
    return Schedule(
        base_lr=base_lr,
        base_batch=order.start.global_batch,
        rule=_RULES[job_info(order.job).learning_rate_rule],
        shape=Shape.CONSTANT,
        total_samples=total,
        warmup_samples=min(WARMUP_STEPS * order.start.global_batch, total // 20),
        ramp_samples=RAMP_STEPS * order.start.global_batch,
    )
