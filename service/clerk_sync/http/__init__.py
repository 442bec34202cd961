"""The two listeners."""
