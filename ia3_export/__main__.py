"""``python -m ia3_export``."""

from ia3_export.cli import main

main()
