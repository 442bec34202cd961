"""`python -m clerk_sync` is `clerk-sync`."""

from clerk_sync.cli import main

main()
