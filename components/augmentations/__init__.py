"""Augmentations: one file each, class `Augmentation`, random changes of training images."""
