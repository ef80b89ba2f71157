"""A device that a user names is here, or it is refused with what is."""

import pytest
import torch

from intactkv_eval.errors import ConfigError
from intactkv_eval.model.devices import automatic_device, check_device, devices_here


@pytest.fixture
def gpus(monkeypatch):
    def so_many(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return so_many


def test_what_is_here_may_be_named(gpus):
    gpus(2)
    assert devices_here()[:3] == ["cpu", "cuda:0", "cuda:1"]
    for name in (None, "cpu", "cuda", "cuda:0", "cuda:1", torch.device("cuda:1"), torch.device("cpu")):
        check_device(name)
    assert automatic_device() == "cuda"
    gpus(0)
    assert automatic_device() == "cpu"
    check_device("cpu")


@pytest.mark.parametrize(
    ("count", "name", "said"),
    [
        (0, "cuda", "device=cuda: cannot be used here, since .*CUDA.*here are cpu"),
        (0, "cuda:0", "device=cuda:0: cannot be used here, since .*CUDA"),
        (2, "cuda:2", "there are 2, cuda:0 to cuda:1; here are cpu, cuda:0, cuda:1"),
        (2, "cuda:-1", "there are 2"),
        (2, "cuda:x", "there are 2"),
        (0, "mps", "sees no mps device"),
        (0, "npu:0", "sees no npu device"),
        (2, "gpu", "it names no device that is known"),
        (2, 0, "device=0: .*it names no device"),
        (2, "", "it names no device"),
        (2, "meta", "it names no device"),
        (2, "cpu:0", "the CPU has no number"),
        (2, "x" * 5000, r"device=x{80}: "),
    ],
)
def test_what_is_not_here_is_refused(gpus, count, name, said):
    gpus(count)
    with pytest.raises(ConfigError, match=said):
        check_device(name)


def test_a_gpu_that_is_hidden_is_told_from_a_build_without_cuda(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="is built without CUDA: install"):
        check_device("cuda:0", "--device ")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match=r"^--device cuda:0: .*CUDA_VISIBLE_DEVICES"):
        check_device("cuda:0", "--device ")


def test_metal_is_named_with_and_without_its_number(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    check_device("mps")
    check_device("mps:0")
    with pytest.raises(ConfigError, match="here are cpu, mps"):
        check_device("mps:1")
