"""What is timed: inputs, bytes, FLOPs and peers, a module an op."""
