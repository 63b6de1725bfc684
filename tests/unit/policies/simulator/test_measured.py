from __future__ import annotations

import pytest

from orchestrator.policies.simulator import TableError
from orchestrator.policies.simulator.tables import read_sharing, read_tiers
from orchestrator.policies.tier import Tier
from tests.bench.bench_simulator import LIKE, variant
from tests.bench.simulated_search import MEASURED


def test_the_tables_of_this_project_are_read() -> None:
    sharing = read_sharing((MEASURED / "h200_sharing.csv").read_text().splitlines(), "h200_sharing.csv")
    speeds = read_tiers((MEASURED / "h200_tiers.csv").read_text().splitlines(), "h200_tiers.csv", "graph")
    assert set(LIKE.values()) <= set(sharing)
    assert sharing["gpt-34m"].speed(2 / 15) == pytest.approx(143_360 / 413_000, rel=1e-3)
    assert speeds["gpt-34m"][Tier.BF16] / speeds["gpt-34m"][Tier.TF32] == pytest.approx(829 / 516)
    assert all(a.min_share < 1 and len(a.tiers) == 2 for a in variant(has_fractions=True, has_precision=True).values())


def test_a_table_without_the_whole_device_or_with_an_unknown_tier_is_refused() -> None:
    with pytest.raises(TableError, match="'a' has no line with share 1"):
        read_sharing(["application,share,throughput", "a,0.5,10"], "t.csv")
    with pytest.raises(TableError, match=r"t\.csv:2: tier='bf15'; allowed: .*; did you mean 'bf16'?"):
        read_tiers(["application,tier,throughput", "a,bf15,10"], "t.csv")
