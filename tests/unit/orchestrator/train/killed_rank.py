"""What the test of a killed rank runs: `python killed_rank.py RANK DIRECTORY`, two ranks over gloo, the second dies.

Rank 0 writes what it saw of its groups before, and after a collective has raised, to `DIRECTORY/seen.json`.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from orchestrator.train.groups import Groups


def main(rank: int, directory: Path) -> None:
    store = FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    groups = Groups(rank, 2, torch.device("cpu"))
    before, text = groups.is_broken(0), ""
    for number in range(1_000_000):
        if rank == 1 and number == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            dist.all_reduce(torch.ones(8), group=groups.ranks.group)
        except RuntimeError as error:
            text = str(error)
            break
    seen = {"before": before, "after": groups.is_broken(0), "text": text}
    (directory / "seen.json").write_text(json.dumps(seen))
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
