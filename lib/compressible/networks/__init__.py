"""Plain, deep-linear and compressed layers put into any network by name, and several networks trained side by side."""

from compressible.networks import factorize, layers, models, starts, training

__all__ = ["factorize", "layers", "models", "starts", "training"]
