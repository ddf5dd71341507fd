"""One value for each way to scale a gradient by the factors: its options, defaults and facts."""
