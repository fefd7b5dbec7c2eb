"""Models: located, checked, built, cut, and exported so that other tools load them."""
