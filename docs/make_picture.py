"""Draws the picture of the live table in the README from what a real run wrote.

    python docs/make_picture.py runs/demo

Reads `status.json` of a run that goes on, draws it exactly as the live table would, and keeps both here: the status as
`live-table.json` and the picture as `live-table.svg`. A test draws the kept status again and compares, so the picture
cannot show what the program no longer does. Called by whoever changes the view.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator.run_dirs import read_status
from orchestrator.view.frame import build_frame
from orchestrator.view.terminal import STYLES

HERE = Path(__file__).parent
STATUS_FILE = HERE / "live-table.json"
PICTURE_FILE = HERE / "live-table.svg"
WIDTH = 128
"""Columns: as wide as stays readable on a web page."""

_FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix" xml:space="preserve">
{matrix}
</g>
</g>
</svg>
"""
# Without rich's own form, which loads a font from the network: a picture must not.


def draw(status: dict[str, Any]) -> str:
    """The live table of a status as SVG, at the instant the status was written."""
    frame = build_frame(status, width=WIDTH, max_rows=1 << 30, now_s=float(status["updated_at"]))
    console = Console(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True, highlight=False, markup=False)
    for line in frame.lines:
        console.print(Text(line.text, style=STYLES[line.role], no_wrap=True, overflow="crop"))
    console.print()  # a free line, or the last one's descenders are cut
    title = f"orchestrator watch {status['run_id']}"
    # Rich pads with no-break spaces and leaves blanks at the ends of its lines; the file is ASCII without them.
    svg = console.export_svg(title=title, code_format=_FORMAT, unique_id="table").replace(
        "\N{NO-BREAK SPACE}", "&#160;"
    )
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def portable(status: dict[str, Any]) -> dict[str, Any]:
    """The status without the paths of the machine it comes from."""
    trials = [{**trial, "log_path": f"trials/{trial['trial_id']}/log.txt"} for trial in status["trials"]]
    return {**status, "trials": trials}


def main(arguments: list[str]) -> int:
    """Keep the status of a run directory and draw it; without an argument, draw the kept status again."""
    status = json.loads(STATUS_FILE.read_text(encoding="ascii")) if not arguments else read_status(Path(arguments[0]))
    if status is None:
        sys.stderr.write(f"error: {arguments[0]} has no readable status.json; allowed: the directory of a run\n")
        return 2
    STATUS_FILE.write_text(json.dumps(portable(status), indent=1) + "\n", encoding="ascii")
    PICTURE_FILE.write_text(draw(portable(status)), encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
