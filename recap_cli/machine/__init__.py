"""The machine: its devices and cores, and the memory held on it."""
