"""A model in production: its loop's configuration, windows, alarms, permits, labels and page."""
