"""Files that `orchestrator init` writes for the user. Holds no code."""
