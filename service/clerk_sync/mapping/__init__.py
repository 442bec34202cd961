"""The mapping file, and what it makes of an event. No I/O."""
