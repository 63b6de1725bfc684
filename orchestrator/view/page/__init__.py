"""A run, or several, as one HTML file that needs no network: `orchestrator report`.

`gather` reads a run with `telemetry.load` and folds its journal into the courses of its trials (`course`); `values` are
what the page holds; `build` writes them as JSON beside the scripts, the style and the chart library in `assets`. The
scripts put every text into the page as text, never as HTML. Nothing here writes into a run directory.
"""
