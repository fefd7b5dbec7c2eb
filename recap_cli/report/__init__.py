"""One page of a state or of a comparison, for a browser."""
