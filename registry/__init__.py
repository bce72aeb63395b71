"""What is remembered for good: the ledger (the truth), and MLflow (a projection of it that people browse)."""
