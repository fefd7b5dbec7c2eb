"""The machine that a run has: its devices, its cores, and the memory that is held on it."""
