"""Executors: where units run."""
