"""Grids of cells: expanded from a YAML, run by local processes or a Ray cluster, resumed after any end."""
