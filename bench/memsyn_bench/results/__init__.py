"""Tables and findings from records of runs."""
