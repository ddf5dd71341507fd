"""One module for each scaling: the code that scales a gradient by the factors."""
