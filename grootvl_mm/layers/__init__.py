"""Layers that the models are made of, and what they compute again in the backward pass instead of keeping it."""
