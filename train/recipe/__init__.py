"""The recipe: rate, batch and coefficients over tokens, and what makes a step of the gradient."""
