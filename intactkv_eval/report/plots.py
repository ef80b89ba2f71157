"""Figures of one cell, drawn from the numbers that `intactkv figures` saved; no model and no torch.

Colours are cividis and Okabe and Ito's, which tell apart in print and for colour-blind readers. Every axis has its
unit, and the settings stand below each figure.
Source: IntactKV, figures 1 to 3 (activations, attention, loss by the size of the pivot).
"""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intactkv_eval.cell.records import NUMBERS_HASH
from intactkv_eval.errors import ConfigError
from intactkv_eval.report.figure_numbers import read_numbers
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.files import write_atomic
from intactkv_eval.storage.limits import read_bytes

Array = NDArray[Any]
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
FORMATS = ("png", "pdf", "svg")
_MAP = "cividis"


def draw(folder: Path, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """Draw every figure that figures.npz and figures.json of `folder` have numbers for; the files written.

    Raises ConfigError where matplotlib is missing, or the folder holds no numbers.
    """
    plotting = check_drawing(formats)
    numbers, said = _read(folder)
    written = []
    for name, (needed, drawn) in FIGURES.items():
        if needed not in numbers:
            continue
        try:
            figure = drawn(plotting, numbers, said)
            figure.supxlabel("\n".join(wrap(said["settings"], 110)), x=0.01, ha="left", fontsize=7, color="#444444")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            plotting.close("all")
            raise ConfigError(
                f"{folder}: figures.npz and figures.json do not go together ({type(error).__name__}: "
                f"{str(error)[:200]}); run intactkv figures"
            ) from None
        for kind in formats:
            held = BytesIO()
            figure.savefig(held, format=kind, dpi=160, bbox_inches="tight", metadata=_undated(kind))
            written.append(folder / f"{name}.{kind}")
            write_atomic(written[-1], partial(_put, held.getvalue()))
        plotting.close(figure)
    return written


def _read(folder: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """The numbers and the words beside them, which are of one run. Raises ConfigError where there are none."""
    try:
        numbers, digest = read_numbers(folder / "figures.npz")
        said = parse_json(read_bytes(folder / "figures.json"))
        if not isinstance(said, dict) or said.get(NUMBERS_HASH) != digest:
            raise ValueError("figures.npz holds other numbers than those that figures.json is about")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: holds no numbers of figures ({error}); run intactkv figures") from None
    return numbers, said


def _put(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def check_drawing(formats: tuple[str, ...]) -> Any:
    """matplotlib's pyplot. Raises ConfigError where it is missing, or a format is unknown."""
    if not formats or not set(formats) <= set(FORMATS):
        raise ConfigError(f"--formats {','.join(formats)}: use {', '.join(FORMATS)}")
    try:
        import matplotlib as library  # noqa: PLC0415 - optional
        import matplotlib.pyplot as plotting  # noqa: PLC0415 - optional
    except ImportError:
        raise ConfigError("figures need matplotlib: pip install matplotlib") from None
    library.use("Agg")
    library.rcParams.update({"svg.hashsalt": "intactkv", "font.size": 9, "axes.spines.top": False})
    return plotting


def _outliers(plotting: Any, numbers: dict[str, Array], said: dict[str, Any]) -> Any:
    """Flat: the largest magnitude of each token in each layer, relative to the layer's median."""
    sizes = numbers["magnitudes"]
    ratios = sizes / np.maximum(np.median(sizes, axis=1, keepdims=True), 1e-30)
    figure, axes = plotting.subplots(figsize=(9, 5), layout="constrained")
    picture = axes.imshow(np.log2(ratios), aspect="auto", cmap=_MAP, origin="lower", interpolation="nearest")
    _tokens(axes.xaxis, said["words"])
    axes.set(xlabel="token", ylabel="layer", title="Largest output of each layer by token")
    figure.colorbar(picture, label="log2 of max |output| / median of the layer's tokens")
    return figure


def _surface(plotting: Any, numbers: dict[str, Array], said: dict[str, Any]) -> Any:
    """3-D: magnitude by token and channel in one layer; of each channel bin the greatest."""
    surface = numbers["surface"]
    bins = np.array_split(np.arange(surface.shape[1]), min(surface.shape[1], 96))
    heights = np.stack([surface[:, part].max(axis=1) for part in bins], axis=1)
    tokens, channels = np.meshgrid(np.arange(len(heights)), [part.mean() for part in bins], indexing="ij")
    figure = plotting.figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot(projection="3d")
    axes.plot_surface(tokens, channels, heights, cmap=_MAP, rstride=1, cstride=1, linewidth=0, antialiased=False)
    axes.set(xlabel="token", ylabel="channel", zlabel="|output|")
    axes.set_title(f"Outputs of layer {int(numbers['surface_layer'])} by token and channel")
    axes.view_init(elev=28, azim=-52)
    return figure


def _attention(plotting: Any, numbers: dict[str, Array], said: dict[str, Any]) -> Any:
    maps = numbers["attention"]
    figure, all_axes = plotting.subplots(
        1, len(maps), figsize=(3.2 * len(maps) + 0.8, 3.6), squeeze=False, layout="constrained"
    )
    for axes, weights, layer in zip(all_axes[0], maps, said["layers"], strict=True):
        picture = axes.imshow(weights, cmap=_MAP, vmin=0, vmax=1, interpolation="nearest")
        axes.set(
            xlabel="attended token",
            ylabel="attending token" if layer == said["layers"][0] else "",
            title=f"layer {layer}, {said['head']}",
        )
    figure.colorbar(picture, ax=list(all_axes[0]), label="attention weight", shrink=0.8)
    return figure


def _loss(plotting: Any, numbers: dict[str, Array], said: dict[str, Any]) -> Any:
    figure, all_axes = plotting.subplots(1, 2, figsize=(10, 4), layout="constrained")
    kinds = ((all_axes[0], "loss_last", "last layer", BLUE), (all_axes[1], "loss_all", "sum of all layers", GREEN))
    for axes, name, label, colour in kinds:
        _steps(axes, numbers[name], colour)
        axes.set(xlabel="pivot rows that are intact (tokens)", ylabel="mean squared error / 2", title=label)
        _marks(axes, numbers[name].mean(axis=1), said["pivot_words"])
        axes.margins(y=0.16)
    figure.suptitle("Distance to the full-precision model's outputs, by the size of the intact pivot")
    return figure


def _perplexity(plotting: Any, numbers: dict[str, Array], said: dict[str, Any]) -> Any:
    nll = numbers["nll"]
    middle, error = np.exp(nll.mean(axis=1)), _error(nll)
    figure, axes = plotting.subplots(figsize=(7, 4.4), layout="constrained")
    places = np.arange(len(middle))
    axes.fill_between(places, middle * np.exp(-error), middle * np.exp(error), color=BLUE, alpha=0.25, step="mid")
    axes.step(places, middle, where="mid", color=BLUE, label="quantized (band: error of the change since 0 rows)")
    full = float(np.exp(numbers["nll_full"].mean()))
    axes.axhline(full, color=ORANGE, linestyle="--", label=f"full precision: {full:.2f}")
    axes.set(xlabel="pivot rows that are intact (tokens)", ylabel="perplexity (a token)")
    axes.set_title("Perplexity by the size of the intact pivot")
    axes.legend(fontsize=8)
    return figure


def _cache(plotting: Any, numbers: dict[str, Array], said: dict[str, Any]) -> Any:
    figure, all_axes = plotting.subplots(2, 2, figsize=(10, 7.5), sharex="row", layout="constrained")
    for row, name in enumerate(("keys", "values")):
        pair = np.abs(numbers[name])
        top = float(pair.max())
        for axes, part, when in zip(all_axes[row], pair, ("before", "after"), strict=True):
            picture = axes.imshow(part, aspect="auto", cmap=_MAP, vmin=0, vmax=top, interpolation="nearest")
            axes.set(xlabel="channel (heads side by side)", ylabel="token")
            axes.set_title(f"{name} of layer {said['cache_layer']}, {when} quantization")
        figure.colorbar(picture, ax=list(all_axes[row]), label=f"|{name}|")
    return figure


FIGURES: dict[str, tuple[str, Callable[[Any, dict[str, Array], dict[str, Any]], Any]]] = {
    "outliers": ("magnitudes", _outliers),
    "outliers-3d": ("surface", _surface),
    "attention": ("attention", _attention),
    "loss-by-size": ("loss_last", _loss),
    "perplexity-by-size": ("nll", _perplexity),
    "kv-cache": ("keys", _cache),
}
"""Each figure: the numbers that it needs, and what draws it."""


def _steps(axes: Any, values: Array, colour: str) -> None:
    middle, error = values.mean(axis=1), _error(values)
    places = np.arange(len(middle))
    axes.fill_between(places, middle - error, middle + error, color=colour, alpha=0.25, step="mid")
    axes.step(places, middle, where="mid", color=colour, label="band: error of the change since 0 rows")
    axes.legend(fontsize=8)


def _error(values: Array) -> Array:
    """Of each size's mean over texts, the standard error of its paired change since no row was intact."""
    change = values - values[:1]
    if values.shape[1] == 1:
        return np.zeros(len(values))
    error: Array = change.std(axis=1, ddof=1) / np.sqrt(values.shape[1])
    return error


def _marks(axes: Any, middle: Array, words: list[str]) -> None:
    """Numbers and names the tokens behind the three largest falls, below the curve."""
    falls = middle[:-1] - middle[1:]
    for place in np.argsort(falls)[::-1][:3]:
        if falls[place] > 0.02 * middle[0]:
            axes.annotate(
                f"{place + 1}: {words[place]!r}",
                (place + 1, middle[place + 1]),
                xytext=(0, -28),
                textcoords="offset points",
                ha="right" if place > len(falls) / 2 else "left",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "linewidth": 0.6},
            )


def _tokens(axis: Any, words: list[str]) -> None:
    axis.set_ticks(range(len(words)))
    axis.set_ticklabels([repr(word)[1:-1] for word in words], rotation=90, fontsize=6)


def _undated(kind: str) -> dict[str, Any]:
    """The same numbers give the same file."""
    return {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
