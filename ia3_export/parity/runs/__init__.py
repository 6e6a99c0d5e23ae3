"""Proof by running: the same inputs through the live model, the merged one, and its graphs."""
