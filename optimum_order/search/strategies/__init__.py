"""Strategies of a plan. One strategy is one file, with a function `rank`."""
