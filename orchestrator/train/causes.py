"""Why a trial failed, where the reason lies outside of it. Such a trial is tried again when its run is resumed."""

from __future__ import annotations

import errno

from orchestrator.control.orders import Cause
from orchestrator.errors import DamagedError, NoRoomError
from orchestrator.room import is_full
from orchestrator.train.batch.guard import is_out_of_memory
from orchestrator.train.device_fault import is_device_fault

_DISK = frozenset({errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV})


def cause_of(error: BaseException) -> Cause:
    """The cause of what a trial raised."""
    if isinstance(error, DamagedError):
        return Cause.DAMAGE
    if isinstance(error, NoRoomError) or is_full(error) or (isinstance(error, OSError) and error.errno in _DISK):
        return Cause.DISK
    if is_out_of_memory(error):
        return Cause.MEMORY
    return Cause.DEVICE if is_device_fault(error) else Cause.OWN
