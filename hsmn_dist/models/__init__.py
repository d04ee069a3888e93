"""Mathematics on one device; knows nothing of training."""
