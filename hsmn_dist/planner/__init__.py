"""Memory and hours, before a GPU is taken."""
