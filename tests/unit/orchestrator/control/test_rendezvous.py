"""Ranks that leave a trial: they agree, or those that came learn that one did not."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.control.orders import Outcome, Status
from orchestrator.control.rendezvous import Rendezvous


def outcome(status: Status, reason: str = "") -> Outcome:
    return Outcome(status=status, step=1, num_samples=8, reason=reason)


def meet(rendezvous: Rendezvous, outcomes: dict[int, Outcome], world_size: int) -> list[Outcome | None]:
    async def all_ranks() -> list[Outcome | None]:
        calls = (rendezvous.meet("m", "slot-0", rank, world_size, told) for rank, told in outcomes.items())
        return list(await asyncio.gather(*calls))

    return asyncio.run(all_ranks())


def test_ranks_that_agree_all_get_the_same() -> None:
    done = outcome(Status.DONE)
    assert meet(Rendezvous(), {0: done, 1: done}, 2) == [done, done]


def test_the_worst_outcome_counts_for_all() -> None:
    failed = outcome(Status.FAILED, "rank 1 ran out of memory")
    answers = meet(Rendezvous(), {0: outcome(Status.DONE), 1: failed}, 2)
    assert answers == [failed, failed]


@pytest.mark.parametrize("cause", [Status.MEMORY, Status.TIER, Status.FAILED])
def test_what_a_rank_raised_for_want_of_another_is_not_the_cause(cause: Status) -> None:
    own = outcome(cause, "its own")
    assert meet(Rendezvous(), {0: outcome(Status.LOST, "connection reset"), 1: own}, 2) == [own, own]


def test_a_rank_that_never_comes_is_told_to_those_that_did() -> None:
    assert meet(Rendezvous(timeout_s=0.01), {1: outcome(Status.FAILED, "boom")}, 2) == [None]


def test_a_resend_counts_once() -> None:
    async def twice() -> list[Outcome | None]:
        rendezvous = Rendezvous(timeout_s=0.01)
        return [await rendezvous.meet("m", "slot-0", 0, 2, outcome(Status.DONE)) for _ in range(2)]

    assert asyncio.run(twice()) == [None, None]


def test_a_new_worker_group_starts_with_a_clean_sheet() -> None:
    rendezvous = Rendezvous(timeout_s=0.01)
    meet(rendezvous, {0: outcome(Status.FAILED)}, 2)
    rendezvous.forget("slot-0")
    assert meet(rendezvous, {1: outcome(Status.DONE)}, 2) == [None], "rank 0 of the old group does not count"
