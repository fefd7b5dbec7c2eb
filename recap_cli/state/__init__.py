"""The state folder: which stage is done, which files count, one commit point."""
