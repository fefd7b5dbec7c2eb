"""Recipes that ship with RECAP."""
