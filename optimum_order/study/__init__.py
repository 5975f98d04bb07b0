"""Which order? Measuring what an order is worth."""
