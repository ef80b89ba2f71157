"""Grids of cells: expanded from a YAML, run by local processes or Ray, resumed. Knows nothing of options."""
