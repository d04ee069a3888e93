"""Raw rows to batches; receives rank and world size as integers."""
