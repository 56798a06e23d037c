"""A run from its resolved recipe to its checkpoints: the loop, its observers, resuming, export."""
