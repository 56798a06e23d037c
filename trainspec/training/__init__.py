"""Training: the loop that both backends share, its observers, and what it is asked for on a command line."""
