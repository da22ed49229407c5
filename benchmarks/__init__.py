"""Measurements of fxshap: how exact, how close to Shapley values, how fast."""
