"""Runs of the backends as processes: both sides of a check, many at a time, replayed in float64, or with a planted fault."""
