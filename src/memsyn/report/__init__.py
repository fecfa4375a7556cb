"""Pages and pictures of results (the extra `report`): what is drawn here comes from files, and nothing measures here."""
