"""The algorithm: tensors in, tensors out. Nothing here opens a file, prints, or knows a model's name."""
