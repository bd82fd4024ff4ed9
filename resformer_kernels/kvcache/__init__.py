"""Attention over a cache of keys and values: the public op, its schema and its backends."""
