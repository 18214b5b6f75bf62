"""Where depth is, by the names and shapes of the tree alone."""
