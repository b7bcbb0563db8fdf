"""Readers of the datasets, and what was found of them."""
