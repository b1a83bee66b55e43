"""Training of a method's stages: planning, inputs of the stages, the training loop, checkpoints and ranks."""
