"""Helpers of no other place."""
