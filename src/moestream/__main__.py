"""``python -m moestream``."""

from moestream.cli.main import main

main()
