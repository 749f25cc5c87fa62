"""Adapters on a model: attach, merge, switch, combine, extract, look."""
