"""What is estimated of a batch, and how it leaves the backward pass."""
