"""Runs of the backends as processes: both sides of a check, many at a time, replayed, perturbed or with a planted fault."""
