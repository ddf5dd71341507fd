"""Losses, what likelihood is found for each, and whether factors are at its scale."""
