"""What `intactkv quantize` does: a full-precision model in, a quantized checkpoint out; killed, it goes on."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from intactkv_eval import __version__
from intactkv_eval.assemble.chat_date import chat_settings
from intactkv_eval.assemble.checkpoint_info import RECORD, read_quantization
from intactkv_eval.assemble.load_errors import auto_class_of, check_folder, check_layers, check_no_kernel, loading
from intactkv_eval.assemble.tokenizer_check import check_tokenizer
from intactkv_eval.cell.formulas import current, names_of_job
from intactkv_eval.cell.spec import ActivationSpec, PivotSpec
from intactkv_eval.chat.templates import ChatSettings
from intactkv_eval.data.calibration_text import Samples, load_samples
from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.lm.run_record import versions
from intactkv_eval.model.checkpoint_loaders import StrictAutoModel
from intactkv_eval.model.devices import check_device
from intactkv_eval.model.input_transforms import apply_input_transforms, calibrate_ranges
from intactkv_eval.model.matrices import matrix_of
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.pivot.auto import tokens_of
from intactkv_eval.pivot.basis import to_rotated
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.quantize.block_walk import BlockWalk
from intactkv_eval.quantize.export import check_new, export
from intactkv_eval.quantize.job import CalibrationSpec, Job, layout_of
from intactkv_eval.quantize.layerwise import BlockStore, quantize_blocks
from intactkv_eval.quantize.rotation import rotate
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.sanitize import struck_record
from intactkv_eval.storage.files import locked, remove_folder
from intactkv_eval.weights.checkpoint import read_json
from intactkv_eval.weights.formats import FORMATS
from intactkv_eval.weights.formats.intactkv import range_tensors
from intactkv_eval.weights.formats.scheme import CheckpointScheme
from intactkv_eval.weights.input_transform import Rotation
from intactkv_eval.weights.quantized import QuantizedWeight


class Source(NamedTuple):
    """The full-precision model, and where it is worked on: a layer at a time on `device`.

    chat_date: what chat templates read instead of the clock, where the pivot is the head of chat prompts.
    """

    pretrained: str
    dtype: str = "auto"
    revision: str = "main"
    trust_remote_code: bool = False
    device: str = "cpu"
    chat_date: str | None = None


def quantize_to_folder(source: Source, out: Path, asked_layout: str | None, job: Job) -> tuple[int, str]:
    """Quantize every linear layer of the decoder layers and write the checkpoint; their number, and the format.

    Finished decoder layers are kept beside `out` until it is written: the same command goes on with them. Of processes
    that make the same checkpoint at once one does the work.
    Raises ConfigError, CheckpointError, DataError or UnsupportedModelError before `out` is written.
    """
    check_device(source.device, "--device ")
    layout = layout_of(job, asked_layout)
    if layout not in FORMATS:
        raise ConfigError(f"--format {layout}: use one of {', '.join(FORMATS)}")
    check_new(out)
    model, tokenizer = _load(source)
    _check_layout(model, layout, job)
    spec = job.calibration.pivot if job.calibration is not None else None
    chat = _chat(spec, tokenizer, source.chat_date)
    samples, pivot = _calibration(job.calibration, model, tokenizer, source, chat)
    record = _record(job, source, model, samples, pivot)
    if chat.date is not None:
        record["chat_date"] = chat.date
    folder = out.parent / f".{out.name}.blocks"
    with locked(folder / "lock"):
        if not _is_there(out, record):
            work = _Work(job, layout, out, record, folder, _device(source.device))
            _quantize(model, tokenizer, samples, pivot, work)
        remove_folder(folder)
    return len(linear_layers(model)), layout


def _chat(spec: PivotSpec | None, tokenizer: Any, date: str | None) -> ChatSettings:
    """How the chat prompts are rendered whose head is the pivot of the calibration."""
    if spec is not None and spec.source == "prompt":
        return chat_settings(PivotSpec(source="prompt", chat_date=date), tokenizer, {})
    if date is not None:
        raise ConfigError("--chat-date: does nothing without --pivot prompt, the head of chat prompts; drop it")
    return ChatSettings()


def _is_there(out: Path, record: dict[str, Any]) -> bool:
    """Whether another process has made this very checkpoint meanwhile. Raises ConfigError where it is another."""
    config = out / "config.json"
    if config.is_file() and read_json(config).get(RECORD) == json.loads(json.dumps(record)):
        return True
    check_new(out)
    return False


class _Work(NamedTuple):
    """What is made, and where. record: all that the checkpoint's bytes depend on. folder: keeps finished blocks."""

    job: Job
    layout: str
    out: Path
    record: dict[str, Any]
    folder: Path
    device: torch.device | None


def _quantize(
    model: PreTrainedModel, tokenizer: Any, samples: Samples | None, pivot: PivotKV | None, work: _Work
) -> None:
    job, rotation = work.job, None
    if job.rotate:
        rotation = rotate(model)
        apply_input_transforms(model, rotation, ActivationSpec())
        pivot = to_rotated(pivot) if pivot is not None else None
    store = BlockStore(work.folder, {**work.record, "format": work.layout})
    method = job.made()
    tokens = samples.tokens if samples else []
    if pivot is not None:
        longest = len(pivot) + max(map(len, tokens), default=0)
        pivot = PivotedModel(model, pivot.token_ids, pivot).for_length(longest).pivot
    walk = BlockWalk(model, tokens, pivot, method.wants_full_inputs, work.device)
    with tqdm(total=len(walk), desc=f"Quantizing ({job.method})") as bar:
        quantize_blocks(walk, method, store, bar.update)
    layers = {
        f"{walk.name(index)}.{name}": weight
        for index in range(len(walk))
        for name, weight in store.read(index).layers.items()
    }
    ranges = {}
    if job.activations.bits < 16 and job.activations.scheme == "tensor":
        ranges = calibrate_ranges(model, partial(_run_all, walk, tokens))
    scheme = _scheme(job, model, layers, rotation)
    _export(work, scheme, model, tokenizer, layers, range_tensors(ranges))


def _run_all(walk: BlockWalk, samples: Sequence[Tensor]) -> None:
    for sample in tqdm(samples, desc="Ranges of activations"):
        walk.run_model(sample)


def _scheme(
    job: Job, model: PreTrainedModel, layers: Mapping[str, QuantizedWeight], rotation: Rotation | None
) -> CheckpointScheme:
    kept = tuple(n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in layers)
    ordered = any(weight.order is not None for weight in layers.values())
    made_by = f"intactkv_eval:{__version__} {job.method}"
    formula = job.symmetric_formula
    return CheckpointScheme(
        job.bits, job.group_size, job.symmetric, made_by, kept, job.activations, rotation, ordered, formula
    )


def _check_layout(model: PreTrainedModel, layout: str, job: Job) -> None:
    """What the layout cannot hold is said before hours of work, not behind them."""
    method = job.made()
    ordered = bool(job.options.get("act_order")) and not job.options.get("static_groups")
    scheme = CheckpointScheme(job.bits, job.group_size, job.symmetric, "")
    shapes = {tuple(matrix_of(layer).shape): name for name, layer in linear_layers(model).items()}
    for (outputs, inputs), name in shapes.items():
        zeros = quantize_rtn(
            torch.zeros(outputs, inputs), job.bits, job.group_size, job.symmetric_formula, name, torch.float16
        )
        if ordered and zeros.group_size < inputs:
            zeros = replace(zeros, order=torch.arange(inputs, dtype=torch.int32))
        try:
            FORMATS[layout].encode(zeros, scheme)
        except CheckpointError as error:
            raise CheckpointError(f"{name}, {type(method).__name__}: {error}") from None


def _export(
    work: _Work,
    scheme: CheckpointScheme,
    model: PreTrainedModel,
    tokenizer: Any,
    layers: Mapping[str, QuantizedWeight],
    ranges: Mapping[str, Tensor],
) -> None:
    packed = {f"{name}.weight" for name in layers}
    tied = set(model.all_tied_weights_keys or ()) if getattr(model.config, "tie_word_embeddings", False) else set()
    others: dict[str, Tensor] = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in packed | tied
    }
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as beside:
        tokenizer.save_pretrained(beside)
        model.generation_config.save_pretrained(beside)
        config = {**model.config.to_diff_dict(), RECORD: work.record}
        export(work.out, work.layout, scheme, config, layers, {**others, **ranges}, Path(beside))


def _record(
    job: Job, source: Source, model: PreTrainedModel, samples: Samples | None, pivot: PivotKV | None
) -> dict[str, Any]:
    """All that the checkpoint's bytes depend on."""
    found, asked = versions(), job.model_dump(mode="json")
    record: dict[str, Any] = {
        "job": asked,
        "formulas": current(names_of_job(asked)),
        "source": fingerprint_of(model, source.revision).model_dump(mode="json", exclude={"embedding_sample"}),
        "samples": samples.record() if samples else None,
        "pivot_tokens": list(pivot.token_ids) if pivot else None,
        "device": source.device,
        **({"trust_remote_code": True} if source.trust_remote_code else {}),
        "versions": {name: found[name] for name in ("intactkv_eval", "torch", "transformers") if name in found},
    }
    struck: dict[str, Any] = struck_record(record)
    return struck


def _calibration(
    asked: CalibrationSpec | None, model: PreTrainedModel, tokenizer: Any, source: Source, chat: ChatSettings
) -> tuple[Samples | None, PivotKV | None]:
    if asked is None:
        return None, None
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    token_ids: tuple[int, ...] = ()
    if asked.pivot is not None:
        token_ids = _pivot_tokens(asked.pivot, model, tokenizer, source, chat)
    if limit is not None and asked.length + len(token_ids) > limit:
        raise ConfigError(
            f"--length {asked.length}: with {len(token_ids)} pivot tokens more than the model's {limit} positions"
        )
    samples = load_samples(asked.data, tokenizer, asked.samples, asked.length, asked.seed)
    pivot = capture(model, token_ids, fingerprint_of(model, "main")) if token_ids else None
    return samples, pivot


def _pivot_tokens(
    asked: PivotSpec, model: PreTrainedModel, tokenizer: Any, source: Source, chat: ChatSettings
) -> tuple[int, ...]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if asked.kind == "kv_file":
        listed = "+".join(map(str, PivotKV.load(Path(asked.source)).token_ids))
        raise ConfigError(
            f"--pivot {asked.source}: the KV is this model's own; name the tokens: --pivot tokens:{listed}"
        )
    known = (source.pretrained, source.revision, source.dtype)
    return tokens_of(asked, tokenizer, vocabulary, known, lambda: model, chat)


def _device(name: str) -> torch.device | None:
    """Where layers are worked on; None where the model is already."""
    return None if name == "cpu" else torch.device(name)


def _load(source: Source) -> tuple[PreTrainedModel, Any]:
    if source.dtype not in {"auto", "float32", "bfloat16", "float16"}:
        raise ConfigError(f"--dtype {source.dtype}: use auto, float32, bfloat16 or float16")
    options = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    with loading(repr(source.pretrained)):
        check_folder(source.pretrained)
        check_no_kernel(source.pretrained, source.revision)
        check_layers(source.pretrained, source.revision)
        check_tokenizer(source.pretrained, source.revision)
        config = AutoConfig.from_pretrained(source.pretrained, **options)
        auto_class = auto_class_of(source.pretrained, config) or AutoModelForCausalLM
        if read_quantization(source.pretrained, config, source.revision).summary is not None:
            raise ConfigError(f"{source.pretrained} is quantized already: name the full-precision model")
        tokenizer = AutoTokenizer.from_pretrained(source.pretrained, **options)
        model: PreTrainedModel = StrictAutoModel(auto_class).from_pretrained(
            source.pretrained, dtype=source.dtype if source.dtype == "auto" else getattr(torch, source.dtype), **options
        )
        return model.eval(), tokenizer
