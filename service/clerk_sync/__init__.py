"""clerk-sync: verified Clerk webhooks become rows in the app's own database."""

__version__ = "0.1.0"
