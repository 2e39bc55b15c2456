"""The step that all methods share, and what it is made of."""
