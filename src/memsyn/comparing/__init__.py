"""Whether a new model still answers as the old one did, on unlabelled data or by a memory alone."""
