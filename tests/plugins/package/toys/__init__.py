"""A statistic, a grid and a method of each kind for optimum-order, one file each."""
