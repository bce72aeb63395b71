"""What the map of review is made of."""
