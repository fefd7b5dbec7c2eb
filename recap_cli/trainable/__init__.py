"""What of a layer is trainable: compact parameters, their optimizer, and weights that stay frozen in fewer bytes."""
