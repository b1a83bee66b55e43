"""Loss functions: logits and class ids in, a scalar out."""
