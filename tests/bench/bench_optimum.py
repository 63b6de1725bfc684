"""Distance of the joint decision from the optimum of an integer program, on the 200 instances of the conformance test.

What the instances are and what the program knows is said in `tests/conformance/test_optimum.py`; needs `highspy`. The
distance is relative to the optimum's sum of worths. No speed is measured: the machine does not matter.
"""

from __future__ import annotations

import statistics

from tests.bench.results_file import Figure, Report, options
from tests.conformance.test_optimum import MEDIAN, WORST, gaps, instance


def main() -> None:
    """Whole devices and fractions, with and without quotas, one results file."""
    report = Report(options("optimum", repeats=1))
    for uses_fractions in (False, True):
        found = gaps(uses_fractions=uses_fractions)
        words = "with fractions" if uses_fractions else "whole devices"
        for has_quotas in (False, True):
            mine = [gap for seed, gap in enumerate(found) if bool(instance(seed).quotas) is has_quotas]
            report.add(
                Figure(
                    name=f"distance from the optimum, {words}, {'quotas' if has_quotas else 'no quotas'}",
                    value=statistics.median(mine),
                    statistic="median",
                    unit="ratio",
                    low=min(mine),
                    high=max(mine),
                    spread=f"min to max over {len(mine)} instances",
                    values=mine,
                    target=f"median <= {MEDIAN:g}, worst <= {WORST:g}",
                    is_met=statistics.median(mine) <= MEDIAN and max(mine) <= WORST,
                )
            )
    report.write()


if __name__ == "__main__":
    main()
