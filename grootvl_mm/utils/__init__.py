"""Utilities shared by the other packages: safe checkpoint loading, weight checks, process supervision."""
