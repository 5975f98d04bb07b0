"""optimum-order inside other libraries."""
