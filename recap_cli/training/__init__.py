"""The training loop and the evaluation: batches in, numbers out. It knows nothing of rounds.

What is trainable, and its gradient, is the subject of `recap_cli.trainable`.
"""
