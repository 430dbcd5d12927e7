"""lbi: find, with evidence, the fastest low-bit way to run a language model on the hardware at hand."""

__version__ = "0.1.0"
