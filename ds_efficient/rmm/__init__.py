"""RMM: weight gradients from a random sketch of the layer input."""
