"""Processes that serve line by line: each answers a line on its input with one on its output.

Started from a module of this folder, which reads until its input ends. Knows nothing of what is asked. Used where work
must begin in several processes at the same time, after all of them are ready.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tests.bench.results_file import ROOT


class LineWorkers:
    """So many processes, each of which says a first line once it is ready.

    Args:
        count: processes.
        command: the module and its arguments.
        environment: beside that of this process, of the MPS that serves them.
    """

    def __init__(self, count: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        self.hellos = [self._answer(process) for process in self._processes]

    def ask(self, work: Mapping[int, str]) -> dict[int, str]:
        """Give some of them a line each at the same time; their answers.

        Raises:
            RuntimeError: one has ended.
        """
        for number, line in work.items():
            pipe = self._processes[number].stdin
            assert pipe is not None
            pipe.write(f"{line}\n")
            pipe.flush()
        return {number: self._answer(self._processes[number]) for number in work}

    def close(self) -> None:
        """Let them end."""
        for process in self._processes:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {process.wait(10)}")
        return line


def answer(text: str) -> None:
    """What a worker says."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
