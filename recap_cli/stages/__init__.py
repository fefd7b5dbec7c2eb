"""One verb, one function: read the state, compute, write the state."""
