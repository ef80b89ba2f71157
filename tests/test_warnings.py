"""The filters of pyproject.toml: a deprecation warning from our code fails the suite, one from others does not.

These tests try the filters alone; that our code raises none is what every other test shows under them.
"""

import warnings

import pytest


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["intactkv_eval.lm.intactkv_lm", "intactkv_kernels.native"])
def test_a_deprecation_in_our_code_is_an_error(module, kind):
    with pytest.raises(kind):
        warnings.warn_explicit("soon gone", kind, "file.py", 1, module)


def test_others_may_warn():
    with pytest.warns(DeprecationWarning, match="soon gone"):
        warnings.warn_explicit("soon gone", DeprecationWarning, "file.py", 1, "lm_eval.tasks")
