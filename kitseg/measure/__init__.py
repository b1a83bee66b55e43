"""Lesions and kidneys in millimetres, and how far a case can be trusted: arrays in, numbers out."""
