"""Gates: one file each, class `Gate`; a pure function of evidence that fails closed."""
