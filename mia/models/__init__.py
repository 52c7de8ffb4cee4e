"""Models by name: models.toml, the Hugging Face hub."""
