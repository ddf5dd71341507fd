"""The optimizer's state by parameter: as users see it, as it is saved, and in copies."""
