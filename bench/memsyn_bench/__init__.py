"""The benchmark behind `memsyn-bench`: sequences of tasks, methods, and what they keep and forget.

Needs `pip install memsyn-bench`. Imports the core; nothing in the core may import it.
"""
