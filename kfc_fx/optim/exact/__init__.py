"""Products with the exact Fisher matrix of a batch, and what follows from them."""
