"""What the user steps: the optimizer, its options, and how they become an update."""

from kfc_fx.optim.kfc import KFC

__all__ = ["KFC"]
