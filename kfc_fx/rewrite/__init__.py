"""Blocks become graphs that emit statistics."""
