"""Calibration: the texts it runs on, the walk through a model's decoder layers, and trained pivot KV."""
