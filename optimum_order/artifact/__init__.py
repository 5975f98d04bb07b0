"""One saved folder, and the Hub."""
