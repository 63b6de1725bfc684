"""The run file: what it may say, how it is read, checked and written.

`load_config` gives a `ResolvedRun` or one `ConfigError` with every problem in it; `require_fit` holds it against this
machine. Imports neither torch nor ray.

`source` reads YAML with lines, `overrides` lays `--set` over it, `model` and `dials` have the fields and `values` their
types, `checks` and `placement` what must hold between them, `machine` what the machine must offer, `problems` and
`words` make the messages, `render` writes YAML, and `resolve` puts it all together.
"""

from orchestrator.config.dials import BatchDial, DialsSection, PrecisionDial, ShareDial
from orchestrator.config.machine import Machine, this_machine
from orchestrator.config.model import (
    AshaScheduler,
    ClusterSection,
    FifoScheduler,
    JobSection,
    PolicySection,
    RunConfig,
    SearchSection,
    SlotsSection,
    TelemetrySection,
    TrialSection,
)
from orchestrator.config.resolve import ResolvedRun, fit_problems, load_config, require_fit
from orchestrator.config.space import Distribution
from orchestrator.config.values import ParamValue

__all__ = [
    "AshaScheduler",
    "BatchDial",
    "ClusterSection",
    "DialsSection",
    "Distribution",
    "FifoScheduler",
    "JobSection",
    "Machine",
    "ParamValue",
    "PolicySection",
    "PrecisionDial",
    "ResolvedRun",
    "RunConfig",
    "SearchSection",
    "ShareDial",
    "SlotsSection",
    "TelemetrySection",
    "TrialSection",
    "fit_problems",
    "load_config",
    "require_fit",
    "this_machine",
]
