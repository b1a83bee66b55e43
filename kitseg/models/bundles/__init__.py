"""A model as one file: export, download, validate and open."""
