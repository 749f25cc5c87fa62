"""Scores of a model on records, with intervals, and its latency."""
