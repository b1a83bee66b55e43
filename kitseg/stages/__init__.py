"""What a stage predicts (``model``, and one file per paper's stage; PyTorch alone) and how it is trained (``base``)."""
