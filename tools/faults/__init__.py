"""Faults in the middle of training, and what is left after each."""
