"""What the verbs of the Makefile run, apart from what tests."""
