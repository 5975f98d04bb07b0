"""The search for an order, or for a recipe."""
