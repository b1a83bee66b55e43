"""Prediction of whole cases by trained stages."""
