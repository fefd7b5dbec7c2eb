"""The training loop and the evaluation: batches in, numbers out. It knows nothing of rounds."""
