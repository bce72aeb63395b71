"""Passes: one file each, class `Pass`, what makes a trained network smaller or faster."""
