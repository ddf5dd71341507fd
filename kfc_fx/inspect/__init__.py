"""Read-only views of all that the compiler makes."""
