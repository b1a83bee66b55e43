"""Links between stages, the same in training and prediction: arrays in, arrays out."""
