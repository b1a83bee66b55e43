"""What ties one stage to the next, for training and prediction alike: arrays in, arrays out."""
