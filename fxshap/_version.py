"""The version of fxshap, and nowhere else."""

__version__ = "0.1.0"
