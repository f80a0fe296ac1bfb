"""Protocols of published tables; docs/published.md has the results."""
