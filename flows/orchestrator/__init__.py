"""What knows Prefect's API apart from the flows: events, notifications, retries."""
