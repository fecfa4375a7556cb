"""Tensors in, tensors out: the formulas of importance and how they are computed fast.

Knows no model, no autograd graph and no state.
"""
