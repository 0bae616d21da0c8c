"""The model machine: the real pool and a model of its world, side by side."""
