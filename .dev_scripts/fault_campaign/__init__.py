"""Fault injection campaign; see ``__main__.py``."""
