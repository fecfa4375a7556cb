"""A pretrained language model learns new domains, and is asked what it knew before."""
