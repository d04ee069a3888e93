"""Stages in order, retries, the run folder."""
