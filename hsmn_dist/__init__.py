"""hsmn_dist: train HSMN and HOPE language models through a curriculum, and keep what they learned."""

__version__ = "0.1.0"
