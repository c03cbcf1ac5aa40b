"""What is read off a layer: SPADE, linear heads, lenses, and the measures of an answer."""
