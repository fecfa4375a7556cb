"""Importance from the requests that a deployed model serves: sampling, queue, thread, sums by segment and over time."""
