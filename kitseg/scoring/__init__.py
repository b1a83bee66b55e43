"""Official metrics of the KiTS challenges: label arrays in, numbers out. No files, no torch."""
