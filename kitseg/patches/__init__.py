"""From volumes to batches: TorchIO subjects, samplers, the queue and the DataModule."""
