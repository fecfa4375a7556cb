"""The methods that the benchmark compares: what each does beside the one training loop.

The loop is in `memsyn_bench.running.training`; `registry` has the methods by name. Must not know runs or folders.
"""
