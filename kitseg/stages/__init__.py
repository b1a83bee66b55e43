"""What a stage predicts (``model`` and one file a paper's stage, PyTorch alone), and how Lightning trains it (``base``)."""
