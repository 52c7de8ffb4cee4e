"""Sweeps: one run changed along axes. `mia.methods.sweep` is the experiment."""
