"""Scores made of numbers, for the statistics of the report: by the function that the simulation makes them with."""

import importlib.util
import sys
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate_statistics.py"
_spec = importlib.util.spec_from_file_location("simulate_statistics", _SCRIPT)
simulation = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = simulation  # its dataclasses ask for it
_spec.loader.exec_module(simulation)
score = simulation.scored
