"""Importance of a model that another server runs, from its requests: a log, a pipe, or a port."""
