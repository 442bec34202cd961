"""One module per version of clerk-sync's own tables; `TABLES` are those that it makes."""
