"""Evaluation: what a run has learnt, by its held-out records, beside the model that it started from."""
