"""How good a model is on records, with intervals."""
