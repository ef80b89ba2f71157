"""The seams to the libraries beside us: one module for each. Knows nothing of cells, pivots or quantization."""
