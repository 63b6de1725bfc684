"""How a step is executed: one kernel launch after the other (eager), or replayed from CUDA graphs."""
