"""Breaks things on purpose; see ``__main__.py``."""
