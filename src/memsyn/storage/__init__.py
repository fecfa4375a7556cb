"""Files: the safetensors header, atomic replacement, URLs, reading and writing with a checksum.

Must not know parameters or models.
"""
