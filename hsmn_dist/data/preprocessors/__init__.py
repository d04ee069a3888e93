"""Rows of each known dataset to examples."""
