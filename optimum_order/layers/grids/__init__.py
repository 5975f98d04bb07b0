"""Grids: one grid is one file."""
