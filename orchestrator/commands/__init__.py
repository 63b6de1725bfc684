"""The commands, grouped by what they work on; `orchestrator.cli` has the table that finds them.

`files`: run files. `runs`: run directories that live. `after`: what a run left behind. `simulate`: what has not
happened. `machine`: this machine.
"""
