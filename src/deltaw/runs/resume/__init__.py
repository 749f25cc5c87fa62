"""Runs that go on after they died: their folder's layout, a lock, their identity and log, and signals that save first."""
