"""The drawing kit of the verify report and of the pictures of vectors."""
