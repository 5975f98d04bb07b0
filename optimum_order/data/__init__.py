"""Samples that a model reads."""
