"""Where depth is, by what the forward pass does with each parameter."""
