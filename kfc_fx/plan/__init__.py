"""Graphs become blocks: pure data, and the account of every parameter."""
