"""Untrusted input: code of plugins, foreign files and sizes, handled so that they do no harm."""
