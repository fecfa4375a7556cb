"""Follows parameters through a forward pass and turns their output gradients into importance.

Knows no loaders, no files and no user-facing options.
"""
