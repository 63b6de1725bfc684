"""Library adapters: what a library does by itself (evaluate, write checkpoints, resume) reaches the attempt.

One file per library. Its `adapted` changes public methods of the library's classes while a function runs, and puts them
back. A library is adapted when it is imported, which may be in the middle of the function; one that is not costs
nothing. To add one: write such a file, and name it in `ADAPTERS` with the module that defines the classes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from orchestrator.train.function import huggingface, lightning
from orchestrator.train.function.current import TrialInfo
from orchestrator.train.function.offers import Offers


class Host(Protocol):
    """What an adapter asks of the attempt."""

    @property
    def offers(self) -> Offers:
        """Takes the results that the library makes."""
        ...

    @property
    def checkpoint(self) -> Path | None:
        """The directory with the files of the newest checkpoint, None where the function begins anew."""
        ...

    @property
    def info(self) -> TrialInfo:
        """The trial, whose `directory / "work"` the function runs in."""
        ...

    def hold_batch(self, why: str) -> None:
        """The batch cannot change under this library; the reason is shown."""
        ...

    def freeze_batch(self, *, is_frozen: bool) -> None:
        """Whether the batch may change only where a loader is begun anew."""
        ...

    def begin_epoch(self, loader: Any) -> bool:
        """Give a frozen loader the batch size that was asked for; True if that is another one."""
        ...


Adapter = Callable[[ModuleType, Host], AbstractContextManager[None]]

ADAPTERS: Mapping[str, Adapter] = {
    "transformers.trainer": huggingface.adapted,
    "lightning.pytorch.trainer.trainer": lightning.adapted,
    "pytorch_lightning.trainer.trainer": lightning.adapted,
}
"""By the module that they wait for."""


@contextmanager
def installed(host: Host, adapters: Mapping[str, Adapter] = ADAPTERS) -> Iterator[None]:
    """Adapt the libraries that are imported, and those that will be, within."""
    with ExitStack() as stack:

        def adapt(module: ModuleType) -> None:
            stack.enter_context(adapters[module.__name__](module, host))

        finder = _AfterImport({name: adapt for name in adapters if name not in sys.modules})
        for name in adapters:
            if name in sys.modules:
                adapt(sys.modules[name])
        sys.meta_path.insert(0, finder)
        stack.callback(sys.meta_path.remove, finder)
        yield


class _AfterImport(MetaPathFinder):
    """Calls a function with a module when it has been imported."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]) -> None:
        self._waiting = waiting

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """The spec that the other finders have, of a module that is waited for; None for all others."""
        action = self._waiting.pop(fullname, None)  # not asked again, also where the others are asked now
        spec = None if action is None else importlib.util.find_spec(fullname)
        if action is None or spec is None or spec.loader is None:
            return None
        plain = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            plain(module)
            action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
