"""Whether a parameter of a policy is of the type that the policy says it takes.

Policies compare their parameters with numbers; a text among them would end in Python's own words about `<` and `str`.
Called by `config.checks` for run files and by `orchestrator.simulate` for `--set`.
"""

from __future__ import annotations

import types
from enum import Enum
from typing import Literal, Union, get_args, get_origin, get_type_hints

from orchestrator.config.words import looks_like_number, seen

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "null"}


def type_problem(policy: object, name: str, value: object) -> str | None:
    """What is wrong with the type of a value, None where nothing is or nobody can tell.

    Args:
        policy: the policy's class.
        name: of the parameter.
        value: as it was read.
    """
    if not isinstance(policy, type):
        return None
    try:
        hint = get_type_hints(policy).get(name)
    except (NameError, TypeError):
        return None
    members = get_args(hint) if get_origin(hint) in {Union, types.UnionType} else (hint,)
    if any(_fits(member, value) for member in members):
        return None
    allowed = " or ".join(_describe(member) for member in members)
    is_number = bool({int, float} & set(members))
    quoted = "; write it without quotes" if is_number and isinstance(value, str) and looks_like_number(value) else ""
    return f"got {seen(value)}; allowed: {allowed}{quoted}"


def _fits(hint: object, value: object) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in _WORDS and isinstance(hint, type):
        return isinstance(value, hint)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return True  # the policy's own type: it judges itself


def _describe(hint: object) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(str(choice) for choice in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(str(member.value) for member in hint)
    return _WORDS.get(hint, "another value") if isinstance(hint, type) else "another value"
