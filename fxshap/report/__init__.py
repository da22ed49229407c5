"""Reports of what was rewritten, as tables and pictures."""
