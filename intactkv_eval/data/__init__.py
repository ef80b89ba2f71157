"""Public data sets and calibration text, from the hub or a local mirror. Knows nothing of models."""
