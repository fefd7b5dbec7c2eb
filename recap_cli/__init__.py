"""RECAP."""
