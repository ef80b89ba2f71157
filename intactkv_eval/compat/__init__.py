"""The seams to the libraries beside us: one module for each, which holds all that depends on its release."""
