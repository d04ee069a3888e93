"""HOPE: nested learning, continuum memory, self-modifying Titans."""
