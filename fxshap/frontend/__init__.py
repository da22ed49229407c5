"""The arguments and the result of a call: what enters the model and what leaves it."""
