"""Commands from end to end: train, compare, sweep, rank."""
