"""The version of the package, read by the build and by code that must not import torch."""

__version__ = "0.1.0"
