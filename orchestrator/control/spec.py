"""What the controller must know of a run: the resolved run file, reduced to plain frozen values.

Built once by the driver; travels to the actor and is written into the journal, so that a restarted actor has it too.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.control.terms import Terms
from orchestrator.policies.plan import Settings, can_split, on_ranks
from orchestrator.policies.snapshot import DeviceKind, DialLimits, NodeType
from orchestrator.policies.tier import Tier

UNKNOWN_SAMPLES = 10**15
"""The length of a trial that ends when its function returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """How the search stops trials early, as far as a trial's chances depend on it.

    Attributes:
        name: asha, median, hyperband or pbt.
        grace_reports: reports before a trial may be stopped; of pbt those between two perturbations.
        reduction_factor: of asha and hyperband: one in so many goes on from a rung.
        min_trials: of median: trials that a median is taken of, at least.
        quantile: of pbt: part of the population that takes up the state of others.
        rung_patience: of asha: part of the time that a report took which it waits at a rung for others about to come.
    """

    name: str
    grace_reports: int = 1
    reduction_factor: int = 2
    min_trials: int = 0
    quantile: float = 0.0
    rung_patience: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One run.

    Attributes:
        run_id: its name.
        run_dir: its directory, absolute.
        seed: of everything random in it.
        job: a key of `jobs.JOBS`.
        params: job parameters that are the same for every trial.
        speed_free_params: names of parameters that do not change how fast a step is (learning rate, seed ...).
        start: the user's settings of each trial.
        limits: the ranges of the dials.
        dials: names of the dials the policy may turn.
        samples_per_report: samples between two reports of a trial to the search.
        max_reports: reports of a trial that runs to its end.
        policy: a key of `policies.POLICIES`, or 'module:Class'.
        policy_params: its parameters.
        period_s: seconds between two decisions.
        deadline_s: seconds a decision may take.
        restart_budget: slots that may die under one trial before it is failed.
        stale_after_s: seconds without telemetry after which a trial counts as stale.
        idle_close_s: seconds after which an idle slot with nothing queued is closed.
        max_units: use at most this many units of a device (cores), None for all.
        metric: the validation metric the search looks at.
        mode: 'min' or 'max'.
        log_level: of the worker logs.
        probe_budget: part of a trial's time for probes of cheaper tiers.
        exchange_follows_tier: whether ranks exchange gradients in 16 bits while a tier computes in no more.
        max_running: trials at a time; 0 for as many as there are slots.
        resize_patience_s: seconds a worker group of another size may take to open before a trial does without it.
        node_types: nodes that can be asked for, sorted by name; none of them is said to be there.
        max_cost_per_hour: what they may cost together, None for no limit.
        stop_rule: how the search stops trials; None where every one runs to its end, or nobody told (another's search).
        is_function: whether the job is a user's function, which ends by itself and whose samples nobody can foresee.
        import_paths: directories where a job named by import path is looked for, first.
        terms: whose run it is, how much it counts, and what it was promised.
        prefix: by which its trials are told from those of other runs under the same policy; empty where it is alone.
        places: whether the policy pauses trials and chooses their devices; otherwise a trial keeps its slot.
    """

    run_id: str
    run_dir: str
    seed: int
    job: str
    params: dict[str, Any]
    speed_free_params: tuple[str, ...]
    start: Settings
    limits: DialLimits
    dials: tuple[str, ...]
    samples_per_report: int
    max_reports: int
    policy: str
    policy_params: dict[str, Any]
    period_s: float
    deadline_s: float
    restart_budget: int
    stale_after_s: float
    idle_close_s: float
    max_units: int | None
    metric: str
    mode: str
    log_level: str = "INFO"
    probe_budget: float = 0.0
    exchange_follows_tier: bool = False
    max_running: int = 0
    resize_patience_s: float = 120.0
    node_types: tuple[NodeType, ...] = ()
    max_cost_per_hour: float | None = None
    stop_rule: StopRule | None = None
    is_function: bool = False
    import_paths: tuple[str, ...] = ()
    prefix: str = ""
    places: bool = False
    terms: Terms = field(default_factory=Terms)

    @property
    def target_samples(self) -> int:
        """Samples of a trial that runs to its end; more than any has where nobody knows."""
        return UNKNOWN_SAMPLES if self.is_function else self.samples_per_report * self.max_reports

    @property
    def max_step_samples(self) -> int:
        """Samples that a step of a declared training can have at most."""
        return max(self.limits.max_global_batch, self.start.global_batch)

    def start_on(self, num_workers: int) -> Settings:
        """The user's settings on that many ranks; as they are where the global batch does not divide by it."""
        if not can_split(self.start, num_workers):
            return self.start
        return on_ranks(self.start, num_workers, self.limits.max_micro_batch)

    def shape(self, params: dict[str, Any]) -> str:
        """Key of everything that fixes a trial's speed apart from its dials; others are not told what that is."""
        parts = [f"{key}={params[key]}" for key in sorted(params) if key not in self.speed_free_params]
        return self.hidden(",".join([self.job, *parts]))

    def hidden(self, name: str) -> str:
        """A name as other runs may see it: the same for the same name, without saying it."""
        return self.hidden_name(name) if self.prefix else name

    @staticmethod
    def hidden_name(name: str) -> str:
        """A checksum for a name; nothing for none."""
        return hashlib.sha256(name.encode()).hexdigest()[:16] if name else name

    def to_jsonable(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_jsonable(cls, values: dict[str, Any]) -> RunSpec:
        """The inverse of `to_jsonable`, for a restarted actor."""
        fields = dict(values)
        start, limits = dict(fields["start"]), dict(fields["limits"])
        fields["start"] = Settings(**{**start, "tier": Tier(start["tier"])})
        fields["limits"] = DialLimits(**{**limits, "tiers": tuple(Tier(tier) for tier in limits["tiers"])})
        fields["dials"] = tuple(fields["dials"])
        fields["speed_free_params"] = tuple(fields["speed_free_params"])
        fields["import_paths"] = tuple(fields.get("import_paths", ()))
        fields["node_types"] = tuple(
            NodeType(**{**each, "kind": DeviceKind(each["kind"]), "nodes": (), "leaving": ()})
            for each in fields.get("node_types", ())
        )
        fields["terms"] = Terms(**fields.get("terms", {}))
        if fields.get("stop_rule") is not None:
            fields["stop_rule"] = StopRule(**fields["stop_rule"])
        return cls(**fields)
