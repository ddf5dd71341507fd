"""The functions of an update: accumulate, refresh, apply."""
