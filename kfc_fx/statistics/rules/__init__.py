"""From the input and the cotangent of a layer to its statistics, by kind of layer."""
