"""A run as data: YAML files that Hydra composes, installed as ``kitseg.conf``."""
