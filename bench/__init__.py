"""`python -m bench`: how fast clerk-sync is, beside its baselines, in one run."""
