"""Pages, pictures and exports of runs."""
