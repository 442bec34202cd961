"""Connections. Knows neither Clerk nor any table."""
