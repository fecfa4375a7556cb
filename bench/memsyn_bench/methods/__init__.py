"""The methods that the benchmark compares: what each does beside the one training loop of `memsyn_bench.running.learners`.

`registry` has them by name. Must not know runs or folders.
"""
