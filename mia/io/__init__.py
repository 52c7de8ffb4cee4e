"""Files: activations, provenance, reading and writing."""
