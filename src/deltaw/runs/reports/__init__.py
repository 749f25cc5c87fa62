"""Results as pages, tables and sentences."""
