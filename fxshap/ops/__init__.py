"""Low-level operators: dtype policy, `torch.library` registrations and frozen kernels."""
