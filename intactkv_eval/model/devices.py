"""The devices that are here, and whether a name is one of them. Knows nothing of models.

lm_eval's `hf` takes the CPU, without a word, in the place of a device that it does not find, and runs for hours. So
every name that a user gives is checked before anything is loaded.
"""

import torch

from intactkv_eval.errors import ConfigError

_OTHERS = ("xpu", "npu", "hpu")  # accelerators that `hf` knows by number; torch has the last two from plug-ins


def devices_here() -> list[str]:
    """The devices that can be used in this process, as torch and `hf` name them."""
    found = ["cpu", *(f"cuda:{place}" for place in range(_count("cuda")))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found + [f"{kind}:{place}" for kind in _OTHERS for place in range(_count(kind))]


def automatic_device() -> str:
    """What is used where the user names no device: the first GPU, else the CPU."""
    return "cuda" if _count("cuda") else "cpu"


def check_device(name: object, said: str = "device=") -> None:
    """Raise ConfigError unless `name` is a device that is here; None, which chooses nothing, always is.

    said: what stands in front of the name where the user wrote it, as `--device `.
    """
    here = devices_here()
    known = {*here, *(["cuda"] if "cuda:0" in here else []), *(["mps:0"] if "mps" in here else [])}
    if name is None or str(name) in known:
        return
    raise ConfigError(
        f"{said}{str(name)[:80]}: cannot be used here, since {_why_not(str(name))}; here are {', '.join(here)}: "
        "use one of them, or leave it out"
    )


def _count(kind: str) -> int:
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def _why_not(name: str) -> str:
    kind = name.partition(":")[0]
    if kind not in {"cuda", "mps", *_OTHERS}:
        return "it names no device that is known" if kind != "cpu" else "the CPU has no number"
    if kind == "cuda" and not _count("cuda"):
        if torch.version.cuda is None and torch.version.hip is None:
            return f"PyTorch {torch.__version__} is built without CUDA: install a build with it"
        return "PyTorch sees no GPU: look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
    if kind != "mps" and _count(kind):
        return f"of {kind} there are {_count(kind)}, {kind}:0 to {kind}:{_count(kind) - 1}"
    return f"PyTorch {torch.__version__} sees no {kind} device"
