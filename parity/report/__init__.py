"""What a user sees of a verdict: JSON, a diagnosis in words, and a page with charts."""
