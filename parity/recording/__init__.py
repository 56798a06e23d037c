"""Recording the trace of any program: the recorder, its header, and the map of names from one framework to another."""
