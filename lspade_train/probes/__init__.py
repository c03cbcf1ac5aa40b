"""What is read at a layer: SPADE, linear heads, lenses, and measures of confidence."""
