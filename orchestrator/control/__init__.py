"""The policy actor: what happens to plans, trials and slots."""
