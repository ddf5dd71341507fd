"""Predictive distributions of a model's output, and how one is found from the loss."""
