"""The memory that training takes, planned and measured."""
