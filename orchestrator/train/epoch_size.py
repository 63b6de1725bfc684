"""How many samples an epoch of a training has: counted in a process of its own, before a run starts.

The driver loads no data and no code of the user's; `num_samples` starts this module as a program, which reads what is
trained on standard input and answers with one line.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import OrchestratorError

_MARK = "epoch size: "
"""What the line of the answer begins with; the user's code may print as well."""


_TAIL = 2000
"""Characters of what was printed that are shown where there is no answer."""


def num_samples(job: str, params: Mapping[str, Any], import_paths: Sequence[str]) -> int:
    """Samples of an epoch of a declared training with these parameters.

    Raises:
        OrchestratorError: the data cannot be loaded or has no length; the message has what the user's code raised.
    """
    asked = json.dumps({"job": job, "params": dict(params), "import_paths": list(import_paths)}, default=str)
    command = [sys.executable, "-m", "orchestrator.train.epoch_size"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK)), None)
    answer: dict[str, Any] = {} if line is None else json.loads(line.removeprefix(_MARK))
    if "num_samples" not in answer:
        ended = f"counting them ended with exit code {done.returncode}:\n{done.stderr[-_TAIL:]}"
        raise OrchestratorError(str(answer.get("error") or ended))
    return int(answer["num_samples"])


def _count(asked: Mapping[str, Any]) -> int:
    from orchestrator.jobs import build_job
    from orchestrator.jobs.own import UserCodeError, add_import_paths
    from orchestrator.jobs.samples import ENDLESS
    from orchestrator.train.read_ahead import first_cursor, reading

    add_import_paths(asked["import_paths"])
    with reading(build_job(asked["job"], asked["params"])) as training:
        training.prepare()
        found = first_cursor(training, seed=0).num_samples
    if found >= ENDLESS:
        raise UserCodeError("the data is a stream without __len__; give trial.samples_per_report instead")
    return found


def main() -> int:
    """Count, and say so; what the user's code prints does not count."""
    asked = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = {"num_samples": _count(asked)}
    except Exception as error:  # whatever the user's code raises
        from orchestrator.jobs.own import UserCodeError, tail_of

        answer = {"error": str(error) if isinstance(error, UserCodeError) else tail_of(error)}
    sys.stdout.write(f"\n{_MARK}{json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
