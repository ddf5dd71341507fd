"""Runs a generated update and keeps its state."""
