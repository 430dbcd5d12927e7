"""Kernels of our own, for what no library of the environment carries."""
