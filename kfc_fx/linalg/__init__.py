"""Numerics that generated code calls: tensors in, tensors out."""
