"""What people see of a run: the live table, the report at its end, explanations of decisions, and the verdict on it."""
