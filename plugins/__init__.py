"""What ships with RECAP and registers as a stranger's plugin would: reached only through entry points."""
