"""A run as everything sees it: its resolved recipe, its processes, its clock and memory, and what asks it to stop."""
