"""What training takes, planned and measured."""
