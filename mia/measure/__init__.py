"""Losses, metrics, and estimates with their intervals."""
