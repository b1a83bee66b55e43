"""What training minimizes: logits and class ids in, one number out."""
