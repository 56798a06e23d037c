"""What a user sees of a verdict: JSON, lines for a terminal, and a page with charts."""
