"""The simulation of the statistics itself: it passes, and each planted wrong formula fails it."""

import numpy as np
import pytest
from helpers.scores import simulation

from intactkv_eval.report import pairing, resampling, share, significance


def is_right(name, trials):
    [cell] = [cell for cell in simulation.cells() if cell.name == name]
    low, high = cell.bounds(trials)
    return low <= cell.rate(trials) <= high


WINDOWS = "windows, n = 148, AR(1) of 0.5"
CLUSTERS = "40 clusters of about 10, ICC 0.3"
SHARE = "share, n = 20, loss of 2 se, normal"
FEW = "documents, n = 8, lognormal"


@pytest.mark.parametrize("name", [WINDOWS, CLUSTERS, SHARE, FEW])
def test_the_formulas_pass(name):
    assert is_right(name, 150)


def of_single_windows(patch):
    patch.setattr(resampling, "block_length", lambda windows: 1)


def of_single_documents(patch):
    patch.setattr(pairing, "of_units", lambda weight, values, labels=None: resampling.of_units(weight, values))


def as_if_the_loss_were_known(patch):
    """The numerator's error alone, as if the denominator had none: no Fieller."""

    def within(self, level=0.05, is_real=None):
        error = np.sqrt(self.sample.covariance[0, 0]) / abs(self.sample.mean[1])
        return share.ShareSet(self.value - 1.96 * error, self.value + 1.96 * error)

    patch.setattr(share.Share, "within", within)


def of_few(patch):
    for module in (significance, share):
        patch.setattr(module, "MIN_TEST", 2)


@pytest.mark.parametrize(
    ("name", "plant", "trials"),
    [
        (WINDOWS, of_single_windows, 100),
        (CLUSTERS, of_single_documents, 100),
        (SHARE, as_if_the_loss_were_known, 400),
        (FEW, of_few, 150),
    ],
)
def test_a_wrong_formula_fails(name, plant, trials, monkeypatch):
    plant(monkeypatch)
    assert not is_right(name, trials)
