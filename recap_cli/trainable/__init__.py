"""What of a layer is trainable: compact parameters, their optimizer, and weights that stay frozen in fewer bytes.

`build.py` puts the layers in; `linear.py` and `embedding.py` are the layers, whose backwards compute the compact gradients.
"""
