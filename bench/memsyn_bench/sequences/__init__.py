"""Sequences of tasks by name, and the networks that learn them."""
