"""The plugins that ship with RECAP. They register like third-party ones, and are reached by entry points only."""
