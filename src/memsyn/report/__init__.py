"""Pages and pictures of results (the extra `report`): all that is drawn comes from files, and nothing measures here."""
