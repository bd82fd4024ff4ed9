"""Attention over a cache of keys and values, and the cache that shares values over layers."""
