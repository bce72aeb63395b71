"""Engines in processes of their own: loading, queueing, answering and restarting."""
