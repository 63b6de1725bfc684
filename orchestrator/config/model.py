"""What a run file may say: one frozen pydantic model per section, with type, range, unit and default of every field.

Only the shape and the range of single values live here; what must hold between values is in `config.checks`, what the
machine must offer in `config.machine`. Every other part of the orchestrator reads these models and none of them reads
YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.dials import DialsSection
from orchestrator.config.queue import QueueSection
from orchestrator.config.space import Distribution, Space
from orchestrator.config.values import Params, ParamValue, Section
from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.table import job_info
from orchestrator.names import NAME_PATTERN

DEFAULT_REPORTS = 4
"""Reports of a declared training where the run file does not say."""
DEFAULT_SAMPLES = 4096
"""Samples between two reports where neither the run file nor the training says."""
MOST_REPORTS = 10_000
"""More than a function makes: it ends by itself."""
PLACING_POLICIES = frozenset({"fifo", "fluid", "tiresias", "optimus", "pollux", "sia"})
"""Policies that decide nothing but which trials run, and where: to the others they do what `static` does."""


class JobSection(Section):
    """What is trained."""

    name: str = Field(
        description="what is trained: an import path package.module:name of your own, or a job such as language",
        min_length=1,
        max_length=300,
    )
    kind: Literal["auto", "function", "training", "lightning", "huggingface"] = Field(
        default="auto", description="what the import path names; auto: found out by looking at it"
    )
    import_paths: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="directories where the import path is looked for; empty: the working directory and the run file's",
    )
    data: str | None = Field(
        default=None,
        min_length=1,
        max_length=300,
        description="import path of the data of a Lightning or Hugging Face model: a class, a function or an object",
    )
    args: Params = Field(
        default_factory=dict, description="what the library's own trainer would be given, of such a model"
    )
    params: Params = Field(default_factory=dict, description="fixed parameters of the job, by name")

    @property
    def key(self) -> str:
        """What is trained, as one text."""
        return JobKey(path=self.name, kind=self.kind, data=self.data, args=self.args).text


class AshaScheduler(Section):
    """Successive halving: at each rung only the best part of the trials goes on."""

    name: Literal["asha"] = Field(description="successive halving")
    grace_reports: int = Field(
        default=1, ge=1, le=10_000, description="reports every trial gets before it may be stopped"
    )
    reduction_factor: int = Field(default=2, ge=2, le=100, description="at a rung one in this many trials goes on")
    rung_patience: float = Field(
        default=0.25, ge=0, le=1, description="part of a report's time that it waits at a rung for others about to come"
    )


class FifoScheduler(Section):
    """Every trial runs to its end."""

    name: Literal["fifo"] = Field(description="no early stopping")


class MedianScheduler(Section):
    """A trial stops when its best result is worse than the median of the others' averages."""

    name: Literal["median"] = Field(description="median stopping rule")
    grace_reports: int = Field(
        default=1, ge=1, le=10_000, description="reports every trial gets before it may be stopped"
    )
    min_trials: int = Field(default=3, ge=2, le=10_000, description="trials a median is taken of, at least")


class HyperbandScheduler(Section):
    """Brackets of successive halving, in which trials are paused until their rung is full."""

    name: Literal["hyperband"] = Field(description="HyperBand")
    reduction_factor: int = Field(default=3, ge=2, le=100, description="at a rung one in this many trials goes on")


class PbtScheduler(Section):
    """Population based training: the worst trials take up the state of the best, with perturbed parameters."""

    name: Literal["pbt"] = Field(description="population based training")
    interval_reports: int = Field(default=1, ge=1, le=10_000, description="reports between two perturbations")
    quantile: float = Field(default=0.25, gt=0, le=0.5, description="part of the trials that is worst, and best")
    resample: float = Field(
        default=0.25, ge=0, le=1, description="probability that a parameter is drawn anew instead of nudged"
    )
    mutate: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        description="searched parameters that are perturbed; null for all that leave the model's shape alone",
    )


Scheduler = AshaScheduler | FifoScheduler | HyperbandScheduler | MedianScheduler | PbtScheduler


class SearchSection(Section):
    """Which trials there are, and how many at a time."""

    space: Space = Field(
        default_factory=dict,
        description="searched parameters of the job, by name; or a list of such spaces, of which each trial draws from "
        "one; or the import path of a function of Optuna's trial",
    )
    metric: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="name of the reported value that trials are compared by; null: the job's own, a function has none",
    )
    mode: Literal["min", "max"] | None = Field(
        default=None, description="whether less or more of the metric is better; null: as the job says"
    )
    num_trials: int = Field(default=1, ge=1, le=100_000, description="trials in all")
    max_concurrent: int = Field(default=1, ge=1, le=1_000, description="trials at a time, each in a slot or a lane")
    algorithm: Literal["random", "grid", "optuna"] = Field(
        default="random", description="who proposes trials: random (grids inside are honoured), grid, or optuna"
    )
    scheduler: Annotated[Scheduler, Field(discriminator="name")] = Field(
        default=FifoScheduler(name="fifo"),
        description="{name: fifo}, or one that stops trials early: asha, median, hyperband, pbt",
    )

    @property
    def spaces(self) -> tuple[Mapping[str, Distribution], ...]:
        """The spaces that trials are drawn from: one, several, or none where a function draws."""
        if isinstance(self.space, str):
            return ()
        return self.space if isinstance(self.space, tuple) else (self.space,)

    @property
    def one_space(self) -> Mapping[str, Distribution]:
        """The space, where there is one; empty otherwise."""
        return self.spaces[0] if len(self.spaces) == 1 else {}

    @property
    def searched(self) -> Mapping[str, tuple[ParamValue, ...]]:
        """Values that stand for each searched parameter, over all spaces: the listed ones, or the ends of a range."""
        found: dict[str, tuple[ParamValue, ...]] = {}
        for space in self.spaces:
            for name, distribution in space.items():
                found[name] = (*found.get(name, ()), *distribution.samples)
        return found

    @property
    def grid_points(self) -> int:
        """Number of combinations of all grid values; 1 without a grid."""
        points = 1
        for distribution in self.one_space.values():
            points *= len(distribution.grid or (None,))
        return points

    @property
    def num_slots(self) -> int:
        """Slots worth opening: no more than there are trials."""
        return min(self.max_concurrent, self.num_trials)


class TrialSection(Section):
    """How one trial starts and when it reports."""

    samples_per_report: int | None = Field(
        default=None,
        ge=1,
        le=10**12,
        description="training samples between two reports, which evaluate and checkpoint; null: as the training says, "
        "else 4096",
    )
    epochs_per_report: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="epochs between two reports, instead of samples_per_report; samples are counted when a run starts",
    )
    max_reports: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="reports after which a trial is complete; null: 4, and of a function as many as it makes",
    )
    num_workers: int = Field(default=1, ge=1, le=64, description="ranks per trial, at the start")
    micro_batch: int = Field(default=16, ge=1, le=2**20, description="samples per rank per forward at the start")
    grad_accum: int = Field(default=1, ge=1, le=2**16, description="micro-batches per step and rank at the start")
    share: float | None = Field(
        default=None, gt=0, le=1, description="fraction of a device per rank at the start; null for equal parts"
    )
    hang_timeout_s: float | None = Field(
        default=None, ge=10, le=10**6, description="restart a function that makes no step for so long; null: only warn"
    )

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step at the start."""
        return self.micro_batch * self.grad_accum * self.num_workers


class PolicySection(Section):
    """Who turns the dials."""

    name: str = Field(
        default="goodput", min_length=1, max_length=200, description="a policy, or module:Class of your own"
    )
    period_s: float = Field(default=0.5, ge=0.05, le=3600, description="seconds between two decisions")
    deadline_s: float = Field(default=2.0, ge=0.01, le=3600, description="seconds after which a decision is given up")
    params: Params = Field(default_factory=dict, description="parameters of the policy, by name")


class SlotsSection(Section):
    """The long-lived worker groups that serve trials."""

    idle_close_s: float = Field(
        default=60.0, ge=0, le=86_400, description="seconds without a trial before a slot closes"
    )
    restart_budget: int = Field(
        default=2, ge=0, le=100, description="times one trial may lose its slot before it fails"
    )
    open_timeout_s: float = Field(default=120.0, ge=1, le=86_400, description="seconds the first slot may take to open")
    lanes: int = Field(
        default=1, ge=1, le=32, description="trials that one process serves side by side; equal ones are stepped as one"
    )


class TelemetrySection(Section):
    """How often ranks report to the policy actor."""

    send_period_s: float = Field(default=0.5, ge=0.05, le=60, description="seconds between two batches of step records")
    stale_after_s: float = Field(
        default=10.0, ge=0.1, le=3600, description="seconds of silence before a trial is stale"
    )


class DevicesSection(Section):
    """What trials compute on, and how a GPU is shared."""

    use: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="gpu, cpu, or auto: the GPUs of the cluster where it has some, else its cores"
    )
    gpu_share: Literal["auto", "sm_groups", "mps", "time_slice"] = Field(
        default="auto",
        description="how trials share a GPU; auto: SM groups where the share dial turns, MPS where not, else turns",
    )
    memory_fraction: float | None = Field(
        default=None, gt=0, le=1, description="most of a GPU's memory that one rank's allocator may take; null: no cap"
    )
    step_mode: Literal["auto", "eager", "graph", "compiled"] = Field(
        default="auto", description="how steps are executed on a GPU; auto: measured, the fastest one stays"
    )


Resources = Annotated[dict[str, float], Field(min_length=1, max_length=32)]


class NodeTypeSection(Section):
    """A type of node that the cluster's autoscaler can add, and what it costs."""

    resources: Resources = Field(
        description="what one node has, as in the cluster's own file, such as {CPU: 4, GPU: 1, spot_gpu: 1}"
    )
    price_per_hour: float = Field(ge=0, le=1e6, description="of one node, in any currency; 0 where nobody pays")
    max_nodes: int = Field(ge=0, le=10_000, description="the most the run may ask for")
    is_spot: bool = Field(default=False, description="whether it may be taken away at any time")
    device_type: str = Field(
        default="", max_length=100, description="model of its GPUs, such as NVIDIA H200; may be empty"
    )
    speed: float = Field(
        default=1.0, gt=0, le=1e6, description="how fast its devices are relative to others until that is measured"
    )


class ClusterSection(Section):
    """Where the run takes place."""

    address: str = Field(
        default="local",
        min_length=1,
        max_length=300,
        description="local for an own cluster, auto for the running one, or host:port",
    )
    num_cpus: int | None = Field(
        default=None, ge=1, le=100_000, description="cores for a local cluster; null for all this process may use"
    )
    autoscale: bool = Field(
        default=False, description="whether slots that trials wait for may ask the cluster's autoscaler for nodes"
    )
    node_types: dict[str, NodeTypeSection] = Field(
        default_factory=dict, description="nodes that the policy may ask the autoscaler for, by name, with their prices"
    )
    max_cost_per_hour: float | None = Field(
        default=None, gt=0, le=1e9, description="what all nodes of node_types may cost together; null for no limit"
    )


class RunConfig(Section):
    """A whole run file."""

    name: str = Field(pattern=NAME_PATTERN, description="name of the run, and of its directory in storage")
    storage: str = Field(
        default="runs", min_length=1, max_length=4096, description="directory that holds run directories"
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of everything random in the run")
    job: JobSection = Field(description="what is trained")
    search: SearchSection = Field(default=SearchSection(), description="which trials there are")
    trial: TrialSection = Field(default=TrialSection(), description="how one trial starts and reports")
    dials: DialsSection = Field(default=DialsSection(), description="what a policy may turn")
    policy: PolicySection = Field(default=PolicySection(), description="who turns the dials")
    queue: QueueSection = Field(default=QueueSection(), description="whose run it is, and how much it counts")
    slots: SlotsSection = Field(default=SlotsSection(), description="long-lived worker groups")
    telemetry: TelemetrySection = Field(default=TelemetrySection(), description="step records")
    devices: DevicesSection = Field(default=DevicesSection(), description="what trials compute on")
    cluster: ClusterSection = Field(default=ClusterSection(), description="where the run takes place")

    @property
    def import_names(self) -> tuple[str, ...]:
        """The import paths of the user's own: of what is trained, its data, and what draws parameters."""
        space = self.search.space
        names = (self.job.name, self.job.data or "", space if isinstance(space, str) else "")
        return tuple(name for name in names if ":" in name)

    @property
    def max_reports(self) -> int:
        """Reports after which a trial is complete, at most."""
        if self.trial.max_reports is not None:
            return self.trial.max_reports
        return MOST_REPORTS if job_info(self.job.key).is_function else DEFAULT_REPORTS

    @property
    def samples_per_report(self) -> int:
        """Samples between two reports: as given, else as the class of a training declares, else the default."""
        return self.trial.samples_per_report or job_info(self.job.key).samples_per_report or DEFAULT_SAMPLES

    @property
    def start_share(self) -> float:
        """Share of a device each rank starts with: as given, or equal parts inside the range of the dial."""
        if self.trial.share is not None:
            return self.trial.share
        dial = self.dials.share
        if self.places:
            return 1.0
        equal = 1.0 / (self.search.num_slots * self.most_workers)
        return min(max(equal, dial.min), dial.max) if dial.enabled else equal

    @property
    def places(self) -> bool:
        """Whether the policy pauses trials and chooses their devices."""
        enabled = self.dials.placement.enabled
        return self.policy.name in PLACING_POLICIES if enabled is None else enabled

    @property
    def most_workers(self) -> int:
        """The most ranks that a trial can have."""
        return self.dials.workers.max if self.dials.workers.enabled else self.trial.num_workers

    @property
    def num_processes(self) -> int:
        """Worker groups that serve trials: as many as slots, unless some have several lanes."""
        return -(-self.search.num_slots // self.slots.lanes)

    @property
    def num_ranks(self) -> int:
        """Ranks that may be open at the same time: a trial that changes its number has two groups for a while."""
        ranks = self.num_processes * self.most_workers
        return ranks + self.most_workers if self.dials.workers.enabled else ranks
