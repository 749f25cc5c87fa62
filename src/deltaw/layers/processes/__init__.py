"""One run in several processes: who is first, what they agree on, and which records each computes."""
