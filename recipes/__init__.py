"""The shipped recipes, installed as `recap_cli.recipes` and run by name."""
