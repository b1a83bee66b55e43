"""Trained runs opened for prediction: weights, members of an ensemble, what they need and what they have seen."""
