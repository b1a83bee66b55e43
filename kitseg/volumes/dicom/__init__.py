"""DICOM in and out: a file's header, slices on a lattice, series as volumes, the CT of a study, segmentations."""
