"""Targets: one file each, class `Target`; builds an engine from a checkpoint and executes it."""
