"""What to train: the neutral half of twintrain. Imports neither JAX nor torch."""
