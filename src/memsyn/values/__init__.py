"""What is kept: importances, memories, and what can be done with them. Plain frozen values; nothing measures here."""
