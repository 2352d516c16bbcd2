"""``python -m raypar.cli``."""

from raypar.cli import main

main()
