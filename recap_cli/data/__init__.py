"""Examples: where they come from, what their columns and labels mean, and in which order they come."""
