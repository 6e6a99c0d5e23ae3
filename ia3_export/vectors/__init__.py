"""The vectors of an adapter, counted and drawn."""
