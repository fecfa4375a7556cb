"""Follows parameters through a forward pass, and computes importance from output gradients.

Must not know loaders, files or user-facing options.
"""
