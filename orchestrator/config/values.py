"""The values of a run file that are no plain number or text, and what its sections have in common.

Types are strict: `true` is no number and `"1"` is no integer. A value that does not fit says what is allowed.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from orchestrator.config.words import did_you_mean, seen
from orchestrator.policies.tier import NAMED_TIERS, TIER_WORDS, Tier

ParamValue = Any
"""Plain data, as YAML has it: a number, text, a bool, null, or lists and mappings of these."""


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(each) for key, each in value.items()}
    allowed = "text, a finite number, true, false, null, or lists and mappings of these"
    raise PydanticCustomError("words", f"got {seen(value)}; allowed: {allowed}")


Plain = Annotated[ParamValue, BeforeValidator(_plain)]
Params = dict[str, Plain]
Values = Annotated[tuple[Plain, ...], Field(strict=False, min_length=1, max_length=1000)]
FloatBounds = Annotated[tuple[float, float], Field(strict=False)]
IntBounds = Annotated[tuple[int, int], Field(strict=False)]


def _tier(value: object) -> Tier:
    try:
        return Tier(value)  # type: ignore[arg-type]  # anything that is no text is refused there
    except ValueError as error:
        text = str(error)
        if not text.partition("; allowed: ")[0].endswith("names no tier"):
            raise PydanticCustomError("words", f"got {text}") from None
        text = f"got {seen(value)}; allowed: {TIER_WORDS}{did_you_mean(str(value), NAMED_TIERS)}"
        raise PydanticCustomError("words", text.replace("{", "{{").replace("}", "}}")) from None


def _tier_list(value: object) -> object:
    """`auto` as no tiers at all; in a list, a `fixed(k=8,bits=16)` that YAML took apart at its comma made whole."""
    if value == "auto":
        return ()
    if not isinstance(value, (list, tuple)) or not value:
        raise PydanticCustomError("words", f"got {seen(value)}; allowed: auto, or a non-empty list, {TIER_WORDS}")
    items: list[object] = []
    for item in value:
        last = items[-1] if items else None
        is_open = isinstance(last, str) and last.count("(") > last.count(")")
        if is_open and isinstance(item, (str, int)):
            items[-1] = f"{last},{item}"
        else:
            items.append(item)
    return items


TierWord = Annotated[Tier, PlainValidator(_tier), WithJsonSchema({"type": "string"})]
TierList = Annotated[
    tuple[TierWord, ...],
    Field(strict=False),
    BeforeValidator(_tier_list),
    PlainSerializer(lambda tiers: [tier.value for tier in tiers] or "auto"),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]}),
]


class Section(BaseModel):
    """What all sections have in common: frozen, strict, no unknown keys, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
