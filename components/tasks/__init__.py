"""Tasks: one file each, class `Task`; owns head, loss, metrics and how answers are compared."""
