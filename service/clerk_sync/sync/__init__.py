"""Clerk's API becomes changes, beside the webhooks."""
