"""kitseg as a service: beside the command line, above the commands."""
