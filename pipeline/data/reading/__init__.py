"""Reading: from verified bytes of a cache to batches on a device."""
