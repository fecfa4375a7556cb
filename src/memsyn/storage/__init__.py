"""Bytes and files: the safetensors header, atomic replacement, URLs, reading and writing with a checksum.

Does not know what the tensors mean.
"""
