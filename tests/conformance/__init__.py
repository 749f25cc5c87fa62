"""The life of an adapter on the smallest model of every architecture that the installed transformers has."""
