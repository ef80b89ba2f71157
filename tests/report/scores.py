"""Scores made of numbers, for the statistics of the report."""

import numpy as np

from intactkv_eval.report.score import Score


def score(values, of_nll=False, clusters=None, weights=None, tasks=None):
    """A score with these values of documents; clusters: a label of each, tasks: the task of each."""
    tasks = tasks or ["task"] * len(values)
    places = [(task, number) for number, task in enumerate(tasks)]
    mean = float(np.mean(values)) if len(values) else 0.0
    return Score(
        task="task",
        metric="perplexity" if of_nll else "acc",
        value=float(np.exp(mean)) if of_nll else mean,
        stderr=None,
        higher_is_better=not of_nll,
        settings={},
        values=dict(zip(places, map(float, values), strict=True)),
        of_nll=of_nll,
        weights=weights or {},
        clusters={} if clusters is None else dict(zip(places, map(str, clusters), strict=True)),
        cluster_field="" if clusters is None else "passage",
    )
