"""Architecture adapters: tables of names."""
