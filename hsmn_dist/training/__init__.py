"""One stage on one rank: engine, loop, checkpoint."""
