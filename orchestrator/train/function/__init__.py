"""Trials that are a user's own function: it trains by itself, and is seen and changed from outside.

`driver.py` runs one attempt. What it sees and changes: `hooks.py` (steps, losses, learning rates, by torch's optimizer
hooks), `pending.py` (steps whose losses are on their way), `batch.py` (batch sizes of DataLoaders), `noise.py`
(gradient noise), `autocast.py` (the precision tier), `reports.py` and `values.py` (results that it hands to Ray),
`commits.py` (its checkpoints), `workplace.py` (working directory and log), `current.py` (which attempt runs). The model
that it hands over by `orchestrator.watch`: `watched.py`, `calls.py`. What protects it: `guard.py` (from a tier that
harms), `blame.py` (from a tier that its code cannot do with).
What a library does by itself: `adapters.py`, `huggingface.py` and `lightning.py`, with `offers.py` for its results.
"""
