"""From files to the simulator of `policies` and back: workloads, tables, journals of runs, pictures.

What happens in a simulation is decided in `policies.simulator`, which knows no file. Neither torch nor Ray is needed.
"""
