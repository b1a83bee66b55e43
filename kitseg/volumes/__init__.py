"""Volumes: read CT files, resample to a stage's grid, and write labels on the file's own grid."""
