"""The commands' steps, from scans to results; used by the command line and the Python API."""
