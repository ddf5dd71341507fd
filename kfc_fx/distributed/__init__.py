"""One optimizer on several processes: who they are, what they agree on, what they exchange."""
