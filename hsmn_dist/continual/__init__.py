"""Fisher, EWC and transfer metrics, on shards only."""
