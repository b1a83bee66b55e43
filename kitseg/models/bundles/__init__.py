"""A model as one file: packed, fetched, checked and opened."""
