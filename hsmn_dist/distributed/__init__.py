"""Ranks, collectives, flat parameter shards."""
