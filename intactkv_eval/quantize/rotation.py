"""QuaRot's rotation: a model whose activations have no outlier channels, and which computes the same.

    R = diag(signs) H / sqrt(hidden)                       the residual stream is x R
    embedding, o_proj, down_proj write it:                 E R;  R^T W
    q, k, v, gate, up, lm_head read it, norms fused:       (W diag(norm)) R
    V per head, by H of head_dim:                          v_proj's rows, o_proj's columns
    o_proj's input across heads, down_proj's whole input:  the columns here, the input by a transform online

Where no Hadamard matrix of the number of heads is known (9, 14, ...) o_proj has the part per head alone, which needs
nothing online. Keys stay in the plain basis: QuaRot's rotation of q and k cancels in q k, so it is the KV quantizer's
(kv_rotate). Everything is computed in fp64 and stored in the model's own dtype.
Source: QuaRot (Ashkboos et al., 2024), section 4 and rotation_utils.py of its code.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.model.families import FAMILIES, Family, RotatedLayer, rotatable
from intactkv_eval.weights.hadamard import block_digest, hadamard_rows, has_hadamard
from intactkv_eval.weights.input_transform import Rotation

_CHUNK = 4096  # rows in fp64 at once


@torch.no_grad()
def rotate(model: PreTrainedModel, seed: int = 0) -> Rotation:
    """Rotate a full-precision model in place, untying lm_head, and say how.

    It computes the same as before once its layers of `online` have their transforms (model/input_transforms.py).
    Raises UnsupportedModelError, before anything is changed, where the architecture or one of its widths cannot be
    rotated.
    """
    names, width = check_rotatable(model)
    body: Any = model.get_decoder()
    head, embeddings = model.get_output_embeddings(), body.embed_tokens
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = model.config.get_text_config(decoder=True).tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    sign = signs(embeddings.weight.shape[1], seed)
    _rotate_columns(embeddings.weight, sign)
    _fuse(body.norm, [head], sign)
    prefix = next(name for name, module in model.named_modules() if module is body)
    online: dict[str, int] = {}
    for index, layer in enumerate(body.layers):
        _rotate_layer(layer, names, sign, width)
        heads = layer.get_submodule(names.output).in_features // width
        if heads > 1 and has_hadamard(heads):
            online[f"{prefix}.layers.{index}.{names.output}"] = width
        online[f"{prefix}.layers.{index}.{names.down}"] = 1
    orders = sorted({model.get_submodule(name).in_features // across for name, across in online.items()})
    return Rotation(seed, width, online, {str(order): block_digest(order) for order in orders})


def check_rotatable(model: PreTrainedModel) -> tuple[RotatedLayer, int]:
    """The names in a layer, and head_dim. Raises UnsupportedModelError, with the reason, where it cannot be rotated."""
    kind = model.config.get_text_config(decoder=True).model_type
    family = FAMILIES.get(kind, Family())
    if family.rotation is None:
        reason, supported = family.no_rotation or "its layers were not tried", rotatable()
        raise UnsupportedModelError(
            f"{type(model).__name__} ({kind}) cannot be rotated: {reason}. Supported: {', '.join(supported)}; "
            "drop rotate=true (activations can be quantized without it)"
        )
    names, body = family.rotation, model.get_decoder()
    first = body.layers[0]
    width = int(first.self_attn.head_dim)
    for what, order in (
        ("hidden_size", body.embed_tokens.weight.shape[1]),
        ("head_dim", width),
        ("intermediate_size", first.get_submodule(names.down).in_features),
    ):
        if not has_hadamard(order):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be rotated: its {what} is {order}, and no Hadamard matrix of that "
                "order is known; drop rotate=true (activations can be quantized without it)"
            )
    heads = first.get_submodule(names.output).in_features // width
    for order in (body.embed_tokens.weight.shape[1], width, first.get_submodule(names.down).in_features, heads):
        if has_hadamard(order):
            block_digest(order)  # fetched now, so that a missing package is found before anything is changed
    for name in {*names.attention, *names.mlp, names.output, names.down}:
        for index, layer in enumerate(body.layers):
            if type(layer.get_submodule(name)) is not nn.Linear:
                raise UnsupportedModelError(f"layer {index}: {name} is no plain linear layer: rotate the full model")
    return names, width


def signs(width: int, seed: int) -> Tensor:
    """The signs [width] of `seed`, fp64: the same on every machine and in every release of torch."""
    drawn = hashlib.shake_256(f"{seed} {width}".encode()).digest(width)
    return torch.tensor([1.0 - 2.0 * (byte & 1) for byte in drawn], dtype=torch.float64)


def rotated_value(value: Tensor, norm: Tensor, seed: int, head_dim: int) -> Tensor:
    """What rotation makes of v_proj [H*D, I] behind a norm of weights [I], in fp64."""
    return per_head(rotated_reader(value, norm, seed).t(), head_dim).t()


def rotated_reader(matrix: Tensor, norm: Tensor, seed: int) -> Tensor:
    """What rotation makes of rows [R, I] of a matrix that reads behind a norm of weights [I], in fp64."""
    return hadamard_rows(matrix.double() * norm.double() * signs(matrix.shape[1], seed).to(matrix.device))


def rotated_writer(matrix: Tensor, rows: Tensor, seed: int) -> Tensor:
    """Rows [R, I] of what rotation makes of the outputs of a matrix [O, I], in fp64."""
    width = len(matrix)
    sums = hadamard_rows(torch.eye(width, dtype=torch.float64)[rows], inverse=True) * signs(width, seed)
    return sums.to(matrix.device) @ matrix.double()


def per_head(x: Tensor, width: int) -> Tensor:
    """x [..., heads * width], each head transformed by itself."""
    return hadamard_rows(x.reshape(*x.shape[:-1], -1, width)).reshape(x.shape)


def unrotated_rows(rows: Tensor, seed: int) -> Tensor:
    """Rows [N, hidden] of rotated embeddings as they were before, in fp64."""
    return hadamard_rows(rows.double(), inverse=True) * signs(rows.shape[1], seed).to(rows.device)


def _rotate_layer(layer: Any, names: RotatedLayer, sign: Tensor, width: int) -> None:
    _fuse(layer.get_submodule(names.attention_norm), [layer.get_submodule(name) for name in names.attention], sign)
    _fuse(layer.get_submodule(names.mlp_norm), [layer.get_submodule(name) for name in names.mlp], sign)
    value, output, down = (layer.get_submodule(name) for name in (names.value, names.output, names.down))
    _rotate_value(value, layer.self_attn.config.num_key_value_heads * width, width)
    heads = output.in_features // width
    columns = per_head(output.weight.double(), width)
    output.weight.copy_(hadamard_rows(columns, width) if has_hadamard(heads) else columns)
    down.weight.copy_(hadamard_rows(down.weight.double()))
    for writer in (output, down):
        _rotate_outputs(writer, sign)


def _rotate_value(layer: Any, rows: int, width: int) -> None:
    """The last `rows` outputs: V is the whole layer, or the last part of a fused one."""
    part = slice(layer.out_features - rows, None)
    layer.weight[part] = per_head(layer.weight[part].double().t(), width).t().to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias[part] = per_head(layer.bias[part].double(), width).to(layer.bias.dtype)


def _fuse(norm: Any, readers: list[Any], sign: Tensor) -> None:
    """The norm's weights into the layers that read it, then these into the rotated stream."""
    for layer in readers:
        _rotate_columns(layer.weight, sign, norm.weight.double())
    norm.weight.fill_(1)


def _rotate_columns(weight: Tensor, sign: Tensor, scale: Tensor | None = None) -> None:
    """weight [O, I] -> (weight * scale) R, in place."""
    factor = sign.to(weight.device) if scale is None else sign.to(weight.device) * scale
    for start in range(0, len(weight), _CHUNK):
        part = weight[start : start + _CHUNK]
        part.copy_(hadamard_rows(part.double() * factor))


def _rotate_outputs(layer: Any, sign: Tensor) -> None:
    """weight [O, I] -> R^T weight, and the bias alike, in place."""
    factor = sign.to(layer.weight.device)
    layer.weight.copy_(hadamard_rows(layer.weight.double().t() * factor).t())
    if layer.bias is not None:
        layer.bias.copy_(hadamard_rows(layer.bias.double() * factor))
