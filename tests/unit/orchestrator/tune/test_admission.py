"""How many stand-ins fit, which Ray is taken, and which resources a scheduler must not give."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from orchestrator.errors import ConfigError, UnfitEnvironmentError
from orchestrator.tune.admission import HEAD, require_tested_ray, require_untouched, sliver


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("free", [0.5, 0.998, 1.0])
def test_as_many_stand_ins_fit_as_there_are_slots_and_one_more(num_slots: int, free: float) -> None:
    part = sliver(num_slots, free)
    assert part * (num_slots + 1) <= free
    if free == 1.0 and num_slots < 64:
        assert part * (num_slots + 2) > free - 0.02, "and no further one"


def test_a_second_search_of_that_kind_on_one_cluster_is_told_to_wait() -> None:
    with pytest.raises(UnfitEnvironmentError, match="the other search on this cluster"):
        sliver(2, 0.1)


@pytest.mark.parametrize("version", ["2.59.1", "2.61.0", "3.0.0"])
def test_an_untested_ray_is_refused_with_the_range(version: str) -> None:
    with pytest.raises(UnfitEnvironmentError, match=rf"Ray {version} is installed.*ray>=2\.60,<2\.61"):
        require_tested_ray(version)


@pytest.mark.parametrize("version", ["2.60.0", "2.60.3"])
def test_a_tested_ray_is_taken(version: str) -> None:
    require_tested_ray(version)


@dataclass
class Resources:
    required_resources: dict[str, float] = field(default_factory=dict)


def test_a_stand_in_with_more_than_it_asked_for_names_the_scheduler_and_the_alternative() -> None:
    require_untouched(Resources({HEAD: 0.3}))
    require_untouched(Resources({HEAD: 0.3, "CPU": 0.0}))
    require_untouched(None)
    with pytest.raises(ConfigError, match=r"ResourceChangingScheduler cannot.*dials\.share"):
        require_untouched(Resources({HEAD: 0.3, "CPU": 1.0}))
