"""The devices of a run over time: what trials held of each, and what was measured in use.

Reads the table of device samples and the courses of the trials. Called by `gather`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.view.page.course import Course, granted, grants_of
from orchestrator.view.page.thinning import Floats, bucket_means, plain
from orchestrator.view.page.values import DevicePage

_NUM_BUCKETS = 240


def device_pages(
    samples: pa.Table, courses: Mapping[str, Course], kinds: Mapping[str, str], origin_s: float, elapsed_s: float
) -> tuple[DevicePage, ...]:
    """Each device that a trial held or that was measured, in means over at most 240 stretches of the same length."""
    grants = grants_of(courses)
    edges = np.linspace(0.0, max(elapsed_s, 1.0), 1 + min(_NUM_BUCKETS, max(2, int(elapsed_s))))
    measured = {str(name) for name in pc.unique(samples["device_id"]).to_pylist()}
    pages = []
    for device_id in sorted(measured | set(grants)):
        rows = samples.filter(pc.equal(samples["device_id"], device_id))
        t_s = _floats(rows, "wall_s") - origin_s
        inside = (t_s >= 0) & (t_s <= edges[-1])
        pages.append(
            DevicePage(
                device_id=device_id,
                kind=_first(rows, "kind") or kinds.get(device_id, ""),
                t_s=plain(((edges[1:] + edges[:-1]) / 2).tolist()),
                granted=plain(granted(grants.get(device_id, ()), edges).tolist()),
                used=plain(bucket_means(t_s[inside], _floats(rows, "utilisation_ratio")[inside], edges).tolist()),
                memory=plain(bucket_means(t_s[inside], _floats(rows, "memory_used_bytes")[inside], edges).tolist()),
                memory_total=_first(rows, "memory_total_bytes"),
            )
        )
    return tuple(pages)


def _floats(rows: pa.Table, name: str) -> Floats:
    found: Floats = pc.fill_null(rows[name].cast(pa.float64()), float("nan")).to_numpy()
    return found


def _first(rows: pa.Table, name: str) -> Any:  # noqa: ANN401 - of any column
    """The first value that is known."""
    known = rows[name].drop_null()
    return known[0].as_py() if len(known) else None
