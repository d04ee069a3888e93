"""Tar shards in webdataset layout with an index."""
