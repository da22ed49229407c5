"""The report on a rewritten model, as a table and as a picture."""
