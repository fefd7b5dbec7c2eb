"""What a round knows: its plan, its layout, its files and its settings."""
