"""From graphs to the source that a person reads."""
