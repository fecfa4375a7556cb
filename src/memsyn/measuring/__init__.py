"""Turns batches into an `Importance`: the measurement, its checks, its objectives, and resuming."""
