"""Importance criteria."""
