"""The file that `orchestrator up` takes: the policy that runs of a cluster share, and what their users may hold."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from orchestrator.config.model import PLACING_POLICIES, PolicySection
from orchestrator.config.problems import Place, from_pydantic, join
from orchestrator.config.source import parse, read_text
from orchestrator.config.values import Section
from orchestrator.config.words import printable
from orchestrator.errors import ConfigError


class ClusterFile(Section):
    """A shared policy actor."""

    policy: PolicySection = Field(default=PolicySection(), description="who decides for all runs")
    placement: bool | None = Field(
        default=None, description="whether it pauses trials and chooses their devices; null: where it does nothing else"
    )
    storage: str = Field(
        default="cluster", min_length=1, max_length=4096, description="directory of its log and the list of its runs"
    )
    idle_timeout_s: float = Field(
        default=3600.0, ge=1, le=1e7, description="seconds without a run after which the actor ends"
    )
    quotas: dict[str, float] = Field(
        default_factory=dict, description="the most devices that all trials of a user hold, by user"
    )

    @property
    def places(self) -> bool:
        """Whether the policy pauses trials and chooses their devices."""
        return self.policy.name in PLACING_POLICIES if self.placement is None else self.placement


def load_cluster_file(path: Path | None) -> ClusterFile:
    """Read and check the file; what it says by default where there is none.

    Raises:
        ConfigError: anything is wrong; its message has one line per problem.
    """
    if path is None:
        return ClusterFile()
    shown = printable(str(path), 200)
    document = parse(read_text(path), shown)
    place = Place(document, shown, ())
    problems = list(document.problems)
    file = None
    try:
        file = ClusterFile.model_validate(document.data or {})
    except ValidationError as error:
        problems += from_pydantic(error, ClusterFile, place)
    if file is not None:
        problems += [place.error(key, text) for key, text in _contradictions(file)]
    if problems or file is None:
        raise join(sorted(problems, key=lambda problem: problem.line or 0))
    return file


def _contradictions(file: ClusterFile) -> list[tuple[tuple[str | int, ...], str]]:
    from orchestrator.policies import build_policy

    found: list[tuple[tuple[str | int, ...], str]] = []
    if not file.places and file.policy.name in PLACING_POLICIES:
        found.append((("placement",), f"got false, and all that policy {file.policy.name} does is to place trials"))
    for user, most in file.quotas.items():
        if most < 1:
            text = f"got {most:g}, with which no trial could have a whole device; allowed: at least 1"
            found.append((("quotas", user), text))
    if file.quotas and not file.places:
        text = f"policy {file.policy.name} leaves trials where they are, so it cannot keep a quota"
        found.append((("quotas",), f"{text}; allowed: placement: true, or no quotas"))
    try:
        build_policy(file.policy.name, file.policy.params)
    except (ValueError, ConfigError) as error:
        found.append((("policy",), str(error)))
    return found
