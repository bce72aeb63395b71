"""Backbones: one file each, class `Backbone`, images to features."""
