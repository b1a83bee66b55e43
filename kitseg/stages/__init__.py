"""One LightningModule a file: what it minimizes, what it logs, what it predicts."""
