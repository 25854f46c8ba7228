"""``python -m vocabridge`` is the command ``vocabridge``."""

from vocabridge.cli import main

main()
