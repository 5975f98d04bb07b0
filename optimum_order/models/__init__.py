"""The model: blocks and layers, sources, lazy weights."""
