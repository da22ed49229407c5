"""Checks: whether attributions add up, which operation leaks, and the exact Shapley values."""
