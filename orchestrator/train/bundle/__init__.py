"""Trials of one shape stepped as one: stacked parameters, one forward and backward pass, one update.

`kind.py` says which trials may be stepped together, and why not; `bundle.py` steps them; the rest is what it is made
of. Knows no slot, no orders and no telemetry: a member is a trial's own stepper, and what it holds is always that of a
single trial, whose parameters and optimizer state are rows of the stacked ones while it is in a bundle.
"""
