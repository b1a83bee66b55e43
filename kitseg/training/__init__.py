"""One training of a stage after another: what is planned, where it looks, how it runs, saves and ends."""
