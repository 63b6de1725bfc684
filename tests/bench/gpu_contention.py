"""One process of a contention test: matrix products on some SM groups for some seconds; prints TFLOP/s as JSON.

Two of them on disjoint groups reach the sum of both; on the same groups about half the card is idle. `%smid` proves
nothing under MPS, where it is virtual. Started by `bench_gpu_share` and by tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

SIZE = 8192


def main() -> None:
    """Wait for the common start, then count products."""
    import torch

    from orchestrator.share import SmGroups

    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", required=True, help="such as 0-7")
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    low, high = (int(part) for part in given.groups.split("-"))
    share = SmGroups()
    units = tuple(range(low, min(high, share.num_units - 1) + 1))
    share.apply(units, float(len(units)))
    a = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    torch.cuda.current_stream().synchronize()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    began_s, count = time.perf_counter(), 0
    while time.perf_counter() - began_s < given.seconds:
        for _ in range(5):
            a @ b
        torch.cuda.current_stream().synchronize()
        count += 5
    seconds = time.perf_counter() - began_s
    sys.stdout.write(json.dumps({"groups": len(units), "tflops": 2e-12 * SIZE**3 * count / seconds}) + "\n")


if __name__ == "__main__":
    main()
