"""Merges of adapters into a model's weights, their reports, and what gives the weights back."""
