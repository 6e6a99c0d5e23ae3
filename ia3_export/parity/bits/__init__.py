"""Proof of the weights: what every stored tensor must be, bit for bit. No torch."""
