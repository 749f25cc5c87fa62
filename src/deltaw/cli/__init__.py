"""The command line. The only place that prints. Flags and help come from the dataclasses in flags.py and config.py; torch
is imported by the command that was asked for, never for help."""

from deltaw.cli.main import main

__all__ = ["main"]
