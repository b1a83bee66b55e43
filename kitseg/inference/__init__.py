"""A trained stage sees a whole case."""
