"""The proof that an artifact computes what was trained: bit for bit, and by running both."""
