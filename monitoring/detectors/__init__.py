"""Detectors: one file each, class `Detector`; each says whether production differs from the reference in one way."""
