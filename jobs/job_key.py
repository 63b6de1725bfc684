"""What is trained, as one text: an import path, and behind it what `kind`, `data` and `args` of the run file add to it.

One text names a training everywhere, in orders, journals and caches, so that workers build what the run file says. A
job of the table and an import path by itself are their own names. Knows nothing of what the path leads to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

AnyKind = Literal["auto", "function", "training", "lightning", "huggingface"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobKey:
    """What the section `job` of a run file says, but for parameters.

    Attributes:
        path: a name of the table, or an import path.
        kind: what the import path names; auto: found out by looking at it.
        data: import path of the data, for kinds that take it.
        args: what the library's own trainer would be given, for kinds that take it.
    """

    path: str
    kind: AnyKind = "auto"
    data: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The one text; the same for the same values in any order."""
        added: dict[str, Any] = {"kind": self.kind} if self.kind != "auto" else {}
        added |= {"data": self.data} if self.data else {}
        added |= {"args": dict(self.args)} if self.args else {}
        return f"{self.path} {json.dumps(added, sort_keys=True)}" if added else self.path

    @classmethod
    def of(cls, text: str) -> JobKey:
        """The inverse of `text`."""
        path, _, added = text.partition(" ")
        return cls(path=path, **json.loads(added)) if added.startswith("{") else cls(path=text)
