"""Examples: their sources, columns and labels, and their order."""
