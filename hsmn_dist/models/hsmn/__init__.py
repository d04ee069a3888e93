"""Hierarchical Spatial Neural Memory."""
