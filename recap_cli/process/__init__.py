"""This process among others: who may stop it, and with whom it ends."""
