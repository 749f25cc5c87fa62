"""The mathematics on tensors alone."""
