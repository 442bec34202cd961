"""What Clerk sends and answers. Knows no database."""
