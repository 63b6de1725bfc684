"""The dials of a running trial: what the policy may change between two steps, and how each is changed.

`dial.py` has the protocol. A dial for every kind of training: `share.py`. Dials of declared trainings: `declared.py`.
Dials of functions, which change what they see of the training from outside: `orchestrator.train.function`.
"""
