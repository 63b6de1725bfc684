"""The controller of a policy actor that begins: of a new run, or of one that its journal tells of."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from pathlib import Path

from orchestrator.clock import Clock
from orchestrator.control.controller import Controller
from orchestrator.control.orders import Retry
from orchestrator.control.spec import RunSpec
from orchestrator.control.status import write_file
from orchestrator.errors import JournalError
from orchestrator.room import POLL_S, has_room
from orchestrator.run_dirs import read_status

logger = logging.getLogger(__name__)


def begun(spec: RunSpec, clock: Clock, start_id: str, retry: Retry) -> Controller:
    """A controller that has begun; waits for room where the disk is full, because a raising actor is not restarted."""
    run_dir = Path(spec.run_dir)
    while True:
        try:
            return begun_at_once(spec, clock, start_id, retry)
        except (JournalError, OSError) as error:
            if has_room(run_dir):
                raise
            logger.warning("the policy actor waits: %s", error)
            with contextlib.suppress(OSError):
                write_file(
                    run_dir, (read_status(run_dir) or {}) | {"trouble": str(error), "updated_at": clock.wall_s()}
                )
            time.sleep(POLL_S)


def begun_at_once(spec: RunSpec, clock: Clock, start_id: str, retry: Retry) -> Controller:
    """A controller that has begun.

    Raises:
        JournalError, OSError: the journal cannot be written; nothing is held open then.
    """
    controller = Controller(spec, clock, incarnation=uuid.uuid4().hex[:8])
    try:
        controller.begin(start_id, retry)
    except (JournalError, OSError):
        controller.engine.abandon()
        raise
    return controller
