"""Checks: additivity of attributions, leaks of single operations, and exact Shapley values."""
