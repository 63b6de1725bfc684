"""What a search draws parameters from: distributions, alone, inside of one another, in several spaces, or a function.

A choice may list mappings, and what is a distribution in them is drawn with them: so values are nested, and some are
there only where another has a certain value. Knows nothing of who draws. Part of `config.model`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.config.foreign import distribution_in_our_words
from orchestrator.config.values import FloatBounds, IntBounds, ParamValue, Section, Values
from orchestrator.config.words import seen


class Distribution(Section):
    """Where a searched parameter is drawn from: exactly one of the five."""

    uniform: FloatBounds | None = Field(default=None, description="[low, high], every value equally likely")
    loguniform: FloatBounds | None = Field(default=None, description="[low, high], > 0, every magnitude equally likely")
    randint: IntBounds | None = Field(default=None, description="[low, high], whole numbers, high excluded")
    choice: Values | None = Field(default=None, description="a list of values, one drawn at random")
    grid: Values | None = Field(default=None, description="a list of values, each of them tried")

    @model_validator(mode="before")
    @classmethod
    def _is_one_of_five(cls, data: object) -> object:
        wanted = "allowed: one of {uniform: [low, high]}, {loguniform: [low, high]}, {randint: [low, high]}, "
        wanted += "{choice: [a, b]}, {grid: [a, b]}"
        if not isinstance(data, dict):
            raise PydanticCustomError("words", f"got {seen(data)}; {wanted}")
        kinds = [kind for kind in cls.model_fields if kind in data]
        foreign = None if kinds else distribution_in_our_words(data)
        if foreign is not None:
            raise PydanticCustomError("words", "{text}", {"text": foreign})
        if len(kinds) > 1 or not data:
            raise PydanticCustomError("words", f"got {' and '.join(kinds) or 'an empty mapping'}; {wanted}")
        if kinds and data[kinds[0]] is None:
            raise PydanticCustomError("words", f"got no values for {kinds[0]}; {wanted}")
        return data

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Distribution:
        bounds = self.uniform or self.loguniform or self.randint
        if bounds is not None and bounds[0] >= bounds[1]:
            raise PydanticCustomError("words", f"{self.kind}: got [{bounds[0]}, {bounds[1]}]; allowed: low < high")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            low = self.loguniform[0]
            raise PydanticCustomError("words", f"loguniform: got low = {low}; allowed: low > 0, or use uniform")
        listed = self.choice or self.grid or ()
        if len({json.dumps(value, sort_keys=True) for value in listed}) != len(listed):
            raise PydanticCustomError("words", f"{self.kind}: a value is listed twice; list each value once")
        for value in listed:
            for _ in inner(value):
                if self.grid is not None:
                    raise PydanticCustomError("words", "grid: a value holds a distribution; give it as a choice")
        return self

    @property
    def kind(self) -> str:
        """Name of the one distribution given."""
        return next(kind for kind in type(self).model_fields if getattr(self, kind) is not None)

    @property
    def values(self) -> tuple[ParamValue, ...]:
        """The bounds (low, high) or the listed values."""
        found: tuple[ParamValue, ...] = getattr(self, self.kind)
        return found

    @property
    def samples(self) -> tuple[ParamValue, ...]:
        """Values that stand for it: all listed ones, or the two ends of a range; without the distributions inside."""
        if self.randint is not None:
            low, high = self.randint
            return low, high - 1
        return tuple(first_of(value) for value in self.values)

    @property
    def is_listed(self) -> bool:
        """Whether the values are listed rather than bounded."""
        return self.kind in {"choice", "grid"}

    @model_serializer
    def _as_written(self) -> dict[str, list[ParamValue]]:
        return {self.kind: list(self.values)}


def inner(value: object) -> Iterator[Distribution]:
    """The distributions inside of a listed value; a mapping with the name of one as its only key is one.

    Raises:
        ValueError: it is one by its name, and not right.
    """
    found = as_distribution(value)
    if found is not None:
        yield found
    else:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        for part in parts:
            yield from inner(part)


def as_distribution(value: object) -> Distribution | None:
    """A value as the distribution that it is by its form, None for any other value."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in Distribution.model_fields:
        given = next(iter(value.values()))
        return Distribution.model_validate(value) if isinstance(given, list | tuple) and given else None
    return None


def first_of(value: ParamValue) -> ParamValue:
    """A listed value with the first value of each distribution in it."""
    found = as_distribution(value)
    if found is not None:
        return first_of(found.values[0])
    if isinstance(value, dict):
        return {name: first_of(part) for name, part in value.items()}
    return [first_of(part) for part in value] if isinstance(value, list | tuple) else value


def _form(space: Any) -> str:  # noqa: ANN401 - anything that YAML has
    return "function" if isinstance(space, str) else "list" if isinstance(space, list | tuple) else "mapping"


_One = dict[str, Distribution]
Space = Annotated[
    Annotated[_One, Tag("mapping")]
    | Annotated[tuple[_One, ...], Field(strict=False, min_length=1, max_length=100), Tag("list")]
    | Annotated[str, Field(pattern=r"^[^:\s]+:[^:\s]+$", max_length=300), Tag("function")],
    Discriminator(_form),
]
"""`search.space` of a run file."""
