"""What the rules share: the registry, dispatch, caching and numerical helpers."""
