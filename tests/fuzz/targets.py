"""What is fuzzed: every reader of files from strangers. A target makes inputs of a seed, and reads one."""

import copy
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import archives
import mutate
import torch
import yaml
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from intactkv_eval.cache.levels import KVLevels
from intactkv_eval.calibrate.conversations import load_conversations
from intactkv_eval.cell_arguments import cell_from_args
from intactkv_eval.config_files import load_config
from intactkv_eval.files import shipped_folder
from intactkv_eval.harness.lm import IntactKVLM
from intactkv_eval.judge.entries import load_entries
from intactkv_eval.judge.verdict import verdict_of
from intactkv_eval.mt_bench.answers import read_answers
from intactkv_eval.pivot.choice_file import ChoiceFile
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.quantize.awq_search import load_search
from intactkv_eval.report.collect import collect
from intactkv_eval.report.page import page
from intactkv_eval.report.planned import absent_of
from intactkv_eval.report.tables import FORMATS
from intactkv_eval.sweep.grid import expand
from intactkv_eval.sweep.spec import read_sweep
from intactkv_eval.weights.checkpoint import Checkpoint, quantization_beside, read_json
from intactkv_eval.weights.formats import format_of, stage_of
from intactkv_eval.weights.formats.layer import LayerTensors

CHECKPOINTS = Path(__file__).parents[1] / "data" / "gptqmodel"


@dataclass
class Target:
    """make: an input of a random draw. read: reads one; success or an IntactKVError.

    value: a whole document where inputs have a structure; dump: such a one as bytes.
    """

    make: Callable[[Random], bytes]
    read: Callable[[bytes], object]
    value: object = None
    dump: Callable[[object], bytes] = lambda value: json.dumps(value).encode("utf-8", "surrogatepass")


def targets(folder: Path) -> dict[str, Target]:
    """All of them; `folder` holds what they read and its seeds are made there."""
    made = {**_checkpoints(folder), **_tensor_files(folder), **_texts(folder), **_results(folder), **_judge(folder)}
    made |= {**_models(folder), **_calibrations(folder)}
    sent = archives.packed(folder / "seeds" / "results")
    made["archive"] = Target(lambda draw: archives.damaged(sent, draw), partial(archives.read, folder / "archive"))
    return dict(sorted(made.items()))


def _file(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    path = folder / name

    def reading(data: bytes) -> object:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return read(path)

    return reading


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
        stage_of(layout, found)


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
            quantization_beside(path.parent)
            _read_layers(place, said, features)

        def read_index(path: Path) -> None:
            Checkpoint(path.parent).names  # noqa: B018

        shutil.copytree(source, folder / "index" / source.name)
        shutil.copytree(source, folder / "weights" / source.name)
        found |= {
            f"weights-{source.name}": Target(
                lambda draw, data=weights: mutate.of_bytes(data, draw),
                _file(folder / "weights" / source.name, "model.safetensors", read_weights),
            ),
            f"config-{source.name}": Target(
                lambda draw, value=config: mutate.of_json(value, draw),
                _file(folder / "configs" / source.name, "quantize_config.json", read_config),
                config,
            ),
            f"index-{source.name}": Target(
                lambda draw, value=index: mutate.of_json(value, draw),
                _file(folder / "index" / source.name, "model.safetensors.index.json", read_index),
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

        found[f"model-{name.partition('.')[0]}"] = Target(
            lambda draw, value=content: mutate.of_json(value, draw), _file(place, name, read), content
        )
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
            _file(folder, "talks.json", lambda path: load_conversations(str(path))),
            talks,
        ),
        "search": Target(lambda draw: mutate.of_bytes(held.getvalue(), draw), _file(folder, "search.pt", load_search)),
    }


def _map_of(place: Path) -> dict[str, str]:
    with safe_open(str(place / "model.safetensors"), framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), "model.safetensors")


def _tensor_files(folder: Path) -> dict[str, Target]:
    seeds = {name: (folder / "seeds" / name).read_bytes() for name in ("pivot.safetensors", "levels.safetensors")}
    return {
        "pivot": Target(
            lambda draw: mutate.of_bytes(seeds["pivot.safetensors"], draw),
            _file(folder, "one.safetensors", PivotKV.load),
        ),
        "levels": Target(
            lambda draw: mutate.of_bytes(seeds["levels.safetensors"], draw),
            _file(folder, "two.safetensors", KVLevels.load),
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
        "cell": Target(yaml_of(cells), _file(folder, "cell.yaml", cell), yaml.safe_load(cells[0])),
        "sweep": Target(yaml_of(sweeps), _file(folder, "sweep.yaml", sweep), yaml.safe_load(sweeps[0])),
        "choice": Target(
            lambda draw: mutate.of_json(choice, draw), _file(folder, "choice.json", ChoiceFile.load), choice
        ),
    }


def _results(folder: Path) -> dict[str, Target]:
    seeds = folder / "seeds" / "results"
    results = json.loads(next(seeds.glob("results_*.json")).read_text())
    samples = next(seeds.glob("samples_*.jsonl"))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    plan = [{"key": "a", "task": "ppl_x", "seed": None, "cell": results["config"]["intactkv"]["cell"], "hf_arguments": {},
             "quantization": None}]  # fmt: skip
    for name in ("one", "two", "three", "four"):
        shutil.copytree(seeds, folder / name)
    other = copy.deepcopy(results)  # the same measurement with another seed: the two are merged
    for task in other["configs"].values():
        task["metadata"] = {**task["metadata"], "seed": 2}

    def report(path: Path) -> None:
        runs, _ = collect([path.parent])
        absent = absent_of([path.parent])
        for make in FORMATS.values():
            make(runs, absent).encode()
        page(runs, (), absent).encode()

    def jsonl(changed: object) -> bytes:
        listed = changed if isinstance(changed, list) else [changed]
        return b"\n".join(json.dumps(row).encode("utf-8", "surrogatepass") for row in listed)

    def lines(draw: Random) -> bytes:
        data = jsonl(mutate.of_value(rows, draw))
        return mutate.of_bytes(data, draw) if draw.random() < 0.3 else data

    return {
        "results": Target(
            lambda draw: mutate.of_json(results, draw),
            _file(folder / "one", next(seeds.glob("results_*")).name, report),
            results,
        ),
        "seeds": Target(
            lambda draw: mutate.of_json(other, draw),
            _file(folder / "four", "results_2026-01-01T00-00-00.json", report),
            other,
        ),
        "samples": Target(lines, _file(folder / "two", samples.name, report), rows, jsonl),
        "plan": Target(lambda draw: mutate.of_json(plan, draw), _file(folder / "three", "sweep.json", report), plan),
    }


def _judge(folder: Path) -> dict[str, Target]:
    answer = {"question_id": 81, "answer_id": "x", "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"]}],
              "tstamp": 1.0}  # fmt: skip
    replies = [b"I rate it [[7]].", b"Rating: [[10]]", b"[[A]] or [[B]]", b"rating: [3.5]", b"nums[5] [[0]]"]

    def verdicts(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        rating, winner = verdict_of("single", text), verdict_of("pairwise", text)
        assert rating is None or 1 <= float(rating) <= 10
        assert winner in {None, "A", "B", "tie"}

    def reading(path: Path) -> None:
        read_answers(path)
        load_entries([path], "mt_bench")

    return {
        "answers": Target(lambda draw: mutate.of_json(answer, draw), _file(folder, "answers.jsonl", reading), answer),
        "reply": Target(lambda draw: mutate.of_bytes(draw.choice(replies), draw), verdicts),
    }
