"""The training loop and the evaluation: batches in, numbers out. Nothing here knows a round."""
