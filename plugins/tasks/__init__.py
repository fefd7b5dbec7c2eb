"""Tasks: what a model learns, one file each."""
