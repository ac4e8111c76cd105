"""Fleecing: instant, frozen, point-in-time views of a disk that goes on being written, over NBD."""

__version__ = "0.1.0"
