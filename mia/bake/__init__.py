"""Edits as changes of weights, and the files that hold them (`mia.methods.bake`)."""
