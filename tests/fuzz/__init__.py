"""Fuzzing: made and damaged inputs through the commands, and a judge of what they may do. See CONTRIBUTING.md."""
