"""What the parts of visionloop agree on. Nothing is re-exported: an edit re-keys only the stages that use it."""
