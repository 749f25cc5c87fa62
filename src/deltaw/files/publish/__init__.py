"""Adapters and models on their way out: to the hub, and to programs that serve them."""
