"""A study: many orders of one model, measured one by one and written down."""
