"""How a network passes over a whole case, and the meaning of its output channels."""
