"""The small model, a judge and the works over them, for tests that run commands in processes of their own."""

import pytest
from stress.kills import serving_apart, stage


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    with serving_apart() as url:
        yield stage(tmp_path_factory.mktemp("staged"), url)
