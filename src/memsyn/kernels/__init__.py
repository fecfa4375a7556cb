"""The formulas of importance and their fast computation: functions from tensors to tensors.

Must not know models, autograd graphs or state.
"""
