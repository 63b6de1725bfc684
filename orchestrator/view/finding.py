"""One thing that is wrong with a run, as every check of `view.verify` reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Code(StrEnum):
    """The kinds of violations; the words of `verify --json`."""

    OVER_COMMITMENT = "over_commitment"
    UNACKNOWLEDGED = "unacknowledged"
    TORN_ALLOCATION = "torn_allocation"
    PLAN_NOT_FIRST = "plan_not_first"
    ACK_WITHOUT_OFFER = "ack_without_offer"
    REPLAY_MISMATCH = "replay_mismatch"
    SAMPLES_LOST = "samples_lost"
    SAMPLES_REPEATED = "samples_repeated"
    RESULTS_OUT_OF_ORDER = "results_out_of_order"
    TRIAL_LOST = "trial_lost"
    JOURNAL_TORN = "journal_torn"
    TELEMETRY_GAP = "telemetry_gap"
    LEAK = "leak"
    EVIDENCE_MISSING = "evidence_missing"
    EVIDENCE_ALTERED = "evidence_altered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A violation: what, in words with numbers, and whom and which plan it concerns."""

    code: Code
    text: str
    trial_id: str | None = None
    generation: int | None = None


def sentence(violation: Mapping[str, object]) -> str:
    """A violation of `verify`'s answer for people: whom it concerns, what it is, and under which plan."""
    who = "" if violation.get("trial_id") is None else f"{violation['trial_id']}: "
    plan = "" if violation.get("generation") is None else f" (plan {violation['generation']})"
    return f"{who}{violation['text']}{plan} [{violation['code']}]"
