"""How arrays hold layers, and the kernels that mix them."""
