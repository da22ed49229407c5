"""Passes over the captured graph, one a file, and the pipeline that runs them."""
