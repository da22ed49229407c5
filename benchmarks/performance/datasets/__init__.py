"""Throughput, memory and starts of jobs that explain data sets: ``make datasets``."""
