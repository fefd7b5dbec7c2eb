"""Models: found, checked, built, cut to a spec, and written so that other tools load them."""
