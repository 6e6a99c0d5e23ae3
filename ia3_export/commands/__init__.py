"""The public functions, one module a command of the command line."""
