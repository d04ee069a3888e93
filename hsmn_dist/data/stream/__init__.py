"""Shards to batches: order, cursor, packing, collation."""
