"""What telemetry teaches about a trial: speed, gradient noise, memory, tiers, chances. Values and pure functions."""
