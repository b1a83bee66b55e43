"""DICOM input and output: headers, stacks of slices, series as volumes, choice of a study's CT, segmentations."""
