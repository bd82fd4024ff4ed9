"""The cases to time: inputs, bytes, FLOPs and peers, a module an op."""
