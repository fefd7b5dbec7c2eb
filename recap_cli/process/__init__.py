"""How this process is interrupted, and how it ends with its parent."""
