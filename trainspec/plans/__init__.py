"""How a run is spread over devices, what each backend can do of it, and what it costs."""
