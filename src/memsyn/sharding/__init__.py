"""Tensors of which each process holds a part, as `fully_shard` makes of parameters."""
