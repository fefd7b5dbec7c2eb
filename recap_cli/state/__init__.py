"""The folder on disk: which stage is done, which files count, one commit point."""
