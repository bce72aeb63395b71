"""Sources: one file each, class `Source`; brings images into a workspace."""
