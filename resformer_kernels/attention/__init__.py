"""Value-residual attention: the public functions, their schemas and their backends."""
