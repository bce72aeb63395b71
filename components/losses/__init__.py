"""Losses: one file each, class `Loss`, what a step of training makes smaller."""
