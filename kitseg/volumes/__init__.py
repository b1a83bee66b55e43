"""A CT file becomes a volume on a grid, and labels find their way back to the file's own grid."""
