"""How the learning rates of a trial follow its batch, from its order and its training."""

from __future__ import annotations

from torch.optim import Optimizer

from orchestrator.control.orders import TrialOrder
from orchestrator.jobs.training import Training
from orchestrator.train.batch.learning_rate import ScalingRule, Schedule

RAMP_STEPS = 50
"""Steps at the start batch over which a larger batch brings in its larger learning rate (50-100 in practice)."""

# A training names the rule of its optimizer; AdaScale is the linear one as long as noise prevails, and less beyond it.
_RULES = {"sqrt": ScalingRule.SQRT, "linear": ScalingRule.ADASCALE, "none": ScalingRule.NONE}


def schedule_of(order: TrialOrder, training: Training, optimizer: Optimizer) -> Schedule:
    """The warm-up that the training declares; a larger batch brings its larger rate in over some steps of its own."""
    total = order.samples_per_report * order.max_reports
    return Schedule(
        base_batch=order.start.global_batch,
        rule=_RULES[training.learning_rate_rule(optimizer)],
        warmup_samples=min(training.warmup_steps * order.start.global_batch, total // 20),
        ramp_samples=RAMP_STEPS * order.start.global_batch,
    )
