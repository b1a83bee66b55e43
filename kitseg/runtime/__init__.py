"""A verb's work on cases: one after another, side by side, in parts, on many machines, and going on."""
