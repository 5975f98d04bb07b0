"""Search for an order or a recipe."""
