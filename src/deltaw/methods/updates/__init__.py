"""Updates, which a method's plan puts on layers: one file a method."""
