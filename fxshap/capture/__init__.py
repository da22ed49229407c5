"""Capture: from an `nn.Module` and its inputs to one functional ATen graph."""
