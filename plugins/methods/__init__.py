"""Finetuning methods, each under its own entry point in `recap.methods`."""
