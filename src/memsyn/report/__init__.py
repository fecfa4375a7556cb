"""Pages and pictures of memories and results (the extra `report`). Everything comes from files; nothing is measured."""
