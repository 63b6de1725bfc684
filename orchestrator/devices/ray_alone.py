"""What Ray Train sets up for a worker group of one rank: nothing, since it has nobody to talk to.

Imports no torch. Ray's controller of every slot loads this file before it starts the slot's worker; with
`TorchConfig` it would load torch first, which takes seconds of a core and a few hundred MB for each slot.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from ray.train.backend import BackendConfig


@dataclass
class Alone(BackendConfig):  # type: ignore[misc]  # Ray has no types
    """No process group. `backend` is what `TorchTrainer` looks at, to fill in one where none is named."""

    backend: str = "none"

    @property
    def train_func_context(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """As for any torch: the GPU that Ray gave the rank is the current one. Asked for in the driver only."""
        from ray.train.torch import TorchConfig

        context: Callable[[], contextlib.AbstractContextManager[None]] = TorchConfig().train_func_context
        return context
