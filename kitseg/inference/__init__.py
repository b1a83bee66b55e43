"""Inference of trained stages on whole cases."""
