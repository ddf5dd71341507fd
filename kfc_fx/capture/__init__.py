"""A module becomes fx graphs."""
