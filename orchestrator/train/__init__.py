"""What runs on every rank of a worker group: the loop, its boundary, its dials."""
