"""A spec becomes the source of an update; nothing is run here."""
