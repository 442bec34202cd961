"""The live tables against the mapping: checks, DDL, and what the store is bound to."""
