"""What several commands share: the RUN argument with its completion, `--storage`, and printing JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from orchestrator.run_dirs import find_run, list_runs


def _complete_run(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    storage = Path(ctx.params.get("storage") or "runs")
    return [CompletionItem(run.name, help=run.state) for run in list_runs(storage) if run.name.startswith(incomplete)]


run_argument = click.argument("run", shell_complete=_complete_run)
runs_argument = click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True, shell_complete=_complete_run)
storage_option = click.option(
    "--storage",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Directory in which RUN is looked for by name.",
)
trust_option = click.option(
    "--trust-storage", is_flag=True, help="Read checkpoints also where others can write the run directory."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


class NumberRange(click.FloatRange):
    """As click's, which takes `nan`: it compares with no bound, and nothing is ever later than it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """The number.

        Raises:
            click.BadParameter: it is none, or out of range.
        """
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            name = "the value" if param is None else param.opts[0]
            self.fail(f"{name} is nan; allowed: a number", param, ctx)
        return number


def opened(run: str, storage: Path, *, may_be_new: bool = False) -> Path:
    """The run directory of a RUN argument.

    Raises:
        ConfigError: there is no such run.
    """
    return find_run(run, storage, may_be_new=may_be_new)


def print_json(answer: dict[str, Any]) -> None:
    """Print an answer as JSON; values JSON does not know (paths, enums) become text."""
    click.echo(json.dumps(answer, indent=2, default=str))
