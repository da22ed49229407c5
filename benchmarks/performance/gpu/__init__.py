"""What fxshap does on a GPU: correctness, speed and memory, for ``make gpu``."""
