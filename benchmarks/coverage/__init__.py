"""Whole model zoos through fxshap: which networks can be explained, and how exactly."""
