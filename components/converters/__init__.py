"""Converters: what runs in environments of their own, where libraries clash with ours; they import nothing else of us."""
