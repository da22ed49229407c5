"""Helpers for `torch.fx` graphs: nodes, data flow, insertion, provenance."""
