"""What neighbouring layers' gradients share while tasks are trained, and what that foretells."""
