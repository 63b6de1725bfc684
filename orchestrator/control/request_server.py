"""Does what people ask of a run, as files in its directory (`orchestrator.requests`), and answers them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from orchestrator import requests
from orchestrator.control.controller import Controller
from orchestrator.errors import JournalError, RequestError

logger = logging.getLogger(__name__)

_PERIOD_S = 0.2


async def serve(controller: Controller, commit: Callable[[], Awaitable[None]]) -> None:
    """Look for requests for ever; what cannot be written down now is done later.

    Args:
        controller: of the run.
        commit: returns once everything that happened is on disk.
    """
    run_dir = Path(controller.run.spec.run_dir)
    while True:
        await asyncio.sleep(_PERIOD_S)
        try:
            for request in requests.pending(run_dir):
                try:
                    found = controller.steer(request)
                except RequestError as error:
                    found = {"error": {"code": error.code, "message": str(error)}}
                await commit()
                requests.answer(run_dir, request, found)
        except (JournalError, OSError) as error:
            logger.warning("requests wait: %s", error)
        except Exception:
            logger.exception("a request failed")
