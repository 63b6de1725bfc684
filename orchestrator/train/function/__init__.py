"""Trials that are a user's own function: it trains by itself, and is seen and changed from outside.

`driver.py` runs one attempt. What it sees and changes: `hooks.py` (steps, losses, learning rates, by torch's optimizer
hooks), `batch.py` (batch sizes of DataLoaders), `autocast.py` (the precision tier), `reports.py` (results that it hands
to Ray), `commits.py` (its checkpoints), `workplace.py` (working directory and log), `current.py` (which attempt runs).
What a library does by itself: `adapters.py`, `huggingface.py` and `lightning.py`, with `offers.py` for its results.
"""
