"""What is on disk. Knows no model."""
