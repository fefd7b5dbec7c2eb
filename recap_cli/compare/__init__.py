"""Methods beside each other: a grid of runs, their results on disk, and their pictures."""
