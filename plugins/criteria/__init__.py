"""Importance criteria. All of these score entry by entry.

One that looks at activations gives `score_groups` instead: see docs/plugins/criterion.md.
"""
