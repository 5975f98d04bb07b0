"""Running a model on data and keeping what the compression methods ask about it."""
