"""One module per version of clerk-sync's own tables."""
