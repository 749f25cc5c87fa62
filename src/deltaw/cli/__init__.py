"""The command line, the only place that prints. Flags and help come from the dataclasses in flags.py and config.py.

The command that runs imports torch; help never does.
"""

from deltaw.cli.main import main

__all__ = ["main"]
