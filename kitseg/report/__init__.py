"""What a person looks at: ``pictures`` draws cases and training curves, ``page`` collects them in one HTML file."""
