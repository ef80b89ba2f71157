"""What is fuzzed: every reader of files from strangers. A target makes inputs of a seed, and reads one."""

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import archives
import mutate
import torch
import yaml
from kinds import Target, file_read
from reports import PICTURES, answered_targets, compared_targets, judge_targets, results_targets, shown
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.cell.config_files import load_config
from intactkv_eval.chat.conversations import load_conversations
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.pivot.prefix_file import PrefixFile
from intactkv_eval.quantize.awq_search import load_search
from intactkv_eval.storage.files import shipped_folder
from intactkv_eval.sweep.grid import expand
from intactkv_eval.sweep.spec import read_sweep
from intactkv_eval.weights.checkpoint import Checkpoint, quantization_beside, read_json
from intactkv_eval.weights.formats import format_of
from intactkv_eval.weights.formats.layer import LayerTensors

CHECKPOINTS = Path(__file__).parents[1] / "fixtures" / "gptqmodel"


def targets(folder: Path) -> dict[str, Target]:
    """All of them; `folder` holds what they read and its seeds are made there."""
    made = {
        **_checkpoints(folder),
        **_tensor_files(folder),
        **_texts(folder),
        **results_targets(folder),
        **judge_targets(folder),
    }
    made |= {**_models(folder), **_calibrations(folder), **compared_targets(folder), **answered_targets(folder)}
    sent = archives.packed(folder / "seeds" / "results")
    made["pictures"] = Target(
        lambda draw: mutate.of_bytes(draw.choice(PICTURES), draw), file_read(folder / "pictures", "a.svg", shown)
    )
    made["numbers"] = Target(
        archives.damaged_numbers, file_read(folder / "figures", "figures.npz", archives.read_figures)
    )
    made["archive"] = Target(lambda draw: archives.damaged(sent, draw), partial(archives.read, folder / "archive"))
    return dict(sorted(made.items()))


def _features(folder: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer of the model that config.json describes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    named = model.named_modules()
    return {name: (layer.in_features, layer.out_features) for name, layer in named if isinstance(layer, nn.Linear)}


def _read_layers(folder: Path, config, features: dict[str, tuple[int, int]]) -> None:
    layout = format_of(config)
    if layout is None:
        return
    checkpoint = Checkpoint(folder)
    packed = [name for name in features if f"{name}.{layout.main}" in checkpoint.names]
    for name in packed[:: max(1, len(packed) // 3)]:
        held = {key: f"{name}.{key}" for key in layout.tensors if f"{name}.{key}" in checkpoint.names}
        tensors = checkpoint.read(held.values())
        found = LayerTensors(name, {key: tensors[full] for key, full in held.items()}, *features[name])
        layout.read(found).dequantize()
        layout.stage(found)


def _checkpoints(folder: Path) -> dict[str, Target]:
    places = [*sorted(CHECKPOINTS.iterdir()), *sorted((folder / "seeds" / "checkpoints").iterdir())]
    sources = [path for path in places if (path / "model.safetensors").is_file()]
    found = {}
    for source in sources:
        place = folder / "checkpoint" / source.name
        shutil.copytree(source, place)
        config = read_json(place / "config.json")["quantization_config"]
        weights = (place / "model.safetensors").read_bytes()
        index, features = {"weight_map": _map_of(place)}, _features(place)

        def read_weights(path: Path, config=config, features=features) -> None:
            _read_layers(path.parent, config, features)

        def read_config(path: Path, place=place, features=features) -> None:
            said = read_json(path)
            quantization_beside(lambda name: path.parent / name if (path.parent / name).is_file() else None)
            _read_layers(place, said, features)

        def read_index(path: Path) -> None:
            Checkpoint(path.parent).names  # noqa: B018

        shutil.copytree(source, folder / "index" / source.name)
        shutil.copytree(source, folder / "weights" / source.name)
        found |= {
            f"weights-{source.name}": Target(
                lambda draw, data=weights: mutate.of_bytes(data, draw),
                file_read(folder / "weights" / source.name, "model.safetensors", read_weights),
            ),
            f"config-{source.name}": Target(
                lambda draw, value=config: mutate.of_json(value, draw),
                file_read(folder / "configs" / source.name, "quantize_config.json", read_config),
                config,
            ),
            f"index-{source.name}": Target(
                lambda draw, value=index: mutate.of_json(value, draw),
                file_read(folder / "index" / source.name, "model.safetensors.index.json", read_index),
                index,
            ),
        }
    return found


def _models(folder: Path) -> dict[str, Target]:
    """Whole folders of a small model, of which one file is damaged, as the model class loads them."""
    found = {}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        place = folder / "models" / name
        shutil.copytree(folder / "seeds" / "model", place)
        content = json.loads((place / name).read_text())

        def read(path: Path) -> None:
            IntactKVLM(str(path.parent), device="cpu", pivot="none")

        def make(draw: Random, value=content, name=name) -> bytes:
            if name == "tokenizer.json" and draw.random() < 0.1:
                return json.dumps(mutate.of_expressions(value, draw)).encode()
            if name == "tokenizer.json" and draw.random() < 0.2:
                return json.dumps(mutate.of_tokenizer(value, draw)).encode("utf-8", "surrogatepass")
            return mutate.of_json(value, draw)

        found[f"model-{name.partition('.')[0]}"] = Target(make, file_read(place, name, read), content)
    return found


def _calibrations(folder: Path) -> dict[str, Target]:
    talks = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
             {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
             {"turns": ["a", "b"]}, {"text": "prose"}]  # fmt: skip
    search = {"scale": [("norm", ["a", "b"], torch.ones(4))], "clip": [("a", torch.ones(4, 2, 1))]}
    held = io.BytesIO()
    torch.save(search, held)
    return {
        "conversations": Target(
            lambda draw: mutate.of_json(draw.choice([talks, talks[:1] * 3]), draw),
            file_read(folder, "talks.json", lambda path: load_conversations(str(path))),
            talks,
        ),
        "search": Target(
            lambda draw: mutate.of_bytes(held.getvalue(), draw), file_read(folder, "search.pt", load_search)
        ),
    }


def _map_of(place: Path) -> dict[str, str]:
    with safe_open(str(place / "model.safetensors"), framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")


def _tensor_files(folder: Path) -> dict[str, Target]:
    seeds = {name: (folder / "seeds" / name).read_bytes() for name in ("pivot.safetensors", "levels.safetensors")}
    return {
        "pivot": Target(
            lambda draw: mutate.of_bytes(seeds["pivot.safetensors"], draw),
            file_read(folder, "one.safetensors", PivotKV.load),
        ),
        "levels": Target(
            lambda draw: mutate.of_bytes(seeds["levels.safetensors"], draw),
            file_read(folder, "two.safetensors", Codebook.load),
        ),
    }


def _texts(folder: Path) -> dict[str, Target]:
    cells = [path.read_bytes() for path in sorted(shipped_folder("model_configs").glob("*.yaml"))]
    sweeps = [path.read_bytes() for path in sorted(shipped_folder("sweeps").glob("*.yaml"))]
    choice = json.loads((folder / "seeds" / "choice.json").read_text())

    def cell(path: Path) -> None:
        cell_from_args(load_config(str(path)))

    def sweep(path: Path) -> None:
        expand(read_sweep(path.read_text(encoding="utf-8", errors="replace"), path.name))

    def yaml_of(seeds: list[bytes]) -> Callable[[Random], bytes]:
        def make(draw: Random) -> bytes:
            seed = draw.choice(seeds)
            if draw.random() < 0.5:
                return mutate.of_bytes(seed, draw)
            return yaml.safe_dump(mutate.of_value(yaml.safe_load(seed), draw)).encode("utf-8", "surrogatepass")

        return make

    return {
        "cell": Target(yaml_of(cells), file_read(folder, "cell.yaml", cell), yaml.safe_load(cells[0])),
        "sweep": Target(yaml_of(sweeps), file_read(folder, "sweep.yaml", sweep), yaml.safe_load(sweeps[0])),
        "choice": Target(
            lambda draw: mutate.of_json(choice, draw), file_read(folder, "choice.json", PrefixFile.load), choice
        ),
    }
