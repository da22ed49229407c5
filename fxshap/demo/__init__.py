"""The library in one run, on scikit-learn's digits: ``python -m fxshap.demo``."""
