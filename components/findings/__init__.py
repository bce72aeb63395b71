"""Findings: one file each, class `Finding`, one kind of thing that can be wrong with data."""
