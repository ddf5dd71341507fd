"""Code that several scalings and functions share."""
