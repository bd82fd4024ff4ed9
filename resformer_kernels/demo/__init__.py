"""The demo: check the kernels, time them, train small models on real text, write a report."""
