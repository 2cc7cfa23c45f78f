"""Pictures larger than a model or a machine takes whole: overlapping windows, blended."""
