"""For training loops that are not ours: a cache in the order of training, and its tars as a webdataset pipeline."""
