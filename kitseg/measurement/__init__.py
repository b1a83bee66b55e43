"""Measurements of lesions and kidneys, and quality control of a case: arrays in, numbers out."""
