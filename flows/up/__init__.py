"""What stays running: processes, deployments, worker."""
