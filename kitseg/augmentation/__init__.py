"""Random changes of training patches, on the device of the batch: pure functions of tensors."""
