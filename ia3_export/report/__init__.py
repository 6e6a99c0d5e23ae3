"""What `verify` found, as plain data, and its writers."""
