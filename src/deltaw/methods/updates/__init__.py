"""What a method's plan puts on a layer, one file a method."""
