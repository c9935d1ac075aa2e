"""Building blocks of the models, and their activation recomputation."""
