"""One function a verb: the steps of the journey in order."""
