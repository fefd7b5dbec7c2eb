"""The one limit of time that tests have: it guards against a hang, and says nothing of speed."""

HANG_SECONDS = 1500.0  # below pytest's own of 1800 s: the slowest test takes some 10 s on an idle machine
