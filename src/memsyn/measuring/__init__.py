"""From batches to an `Importance`: the measurement, its checks, its objectives, and how it resumes."""
