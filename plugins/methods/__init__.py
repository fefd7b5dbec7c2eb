"""Finetuning methods, each with an entry point in `recap.methods`."""
