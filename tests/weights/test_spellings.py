"""A foreign config in the spellings of all releases means what its writer meant, or is refused by name."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers.packed_files import GPTQ, ct_config, packed_layer

from intactkv_eval.errors import CheckpointError
from intactkv_eval.report.collect import _checkpoint_label
from intactkv_eval.weights.formats import format_of
from intactkv_eval.weights.formats.layer import LayerTensors

MATRIX = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


def read(config, tensors, **names):
    return format_of(config).read(LayerTensors("model.q_proj", tensors, 64, 24, **names)).dequantize(torch.float32)


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        ({}, 7), ({"checkpoint_format": None}, 7), ({"format": "gptq"}, 7), ({"format": "FORMAT.GPTQ"}, 7),
        ({"checkpoint_format": "gptq_v2"}, 8), ({"format": "gptq_v2"}, 8), ({"format": "GPTQ_V2"}, 8),
        ({"format": "FORMAT.GPTQ_V2"}, 8), ({"format": "gptq-v2", "checkpoint_format": "GPTQ_V2"}, 8),
        ({"FORMAT": "gptq_v2"}, 8),
    ],
)  # fmt: skip
def test_the_version_of_gptq(said, stored):
    """v1 stores zero points less one, v2 as they are: the wrong one shifts every weight by a step."""
    tensors, meant = packed_layer("gptq", MATRIX, stored)
    assert torch.equal(read({**GPTQ, **said}, tensors), meant)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": "gptq_v2", "checkpoint_format": "gptq"}, "checkpoint_format is 'gptq' and format is 'gptq_v2'"),
        ({"format": "gptq_p"}, "checkpoint_format is 'gptq_p'; read natively are gptq and gptq_v2"),
        ({"format": 2}, "checkpoint_format is '2'"),
        ({"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({"bits": 4, "w_bit": 3}, "bits is 4 and w_bit is 3"),
        ({"actorder": "rows", "desc_act": None}, "act-order is 'rows'"),
        ({"dynamic": {"model": {"format": "gptq_v2"}}}, "has a format of its own"),
    ],
)  # fmt: skip
def test_what_gptq_config_contradicts_or_is_not_read(said, message):
    with pytest.raises(CheckpointError, match=message):
        read({**GPTQ, **said}, packed_layer("gptq", MATRIX, 7)[0])


@pytest.mark.parametrize(
    "said",
    [
        {"wbits": 4, "q_group_size": 32}, {"w_bit": "4", "groupsize": 32.0}, {"bits": 4, "group_size": "32"},
        {"bits": 3, "group_size": 32, "dynamic": {"other": {}, "+:model": {"w_bit": 4}}},
    ],
)  # fmt: skip
def test_other_keys_of_gptq(said):
    tensors, meant = packed_layer("gptq", MATRIX, 7)
    assert torch.equal(read({"quant_method": "gptq", **said}, tensors), meant)


ORDERS = [
    ({"desc_act": False}, "gptq w4g32 sym"),
    ({"desc_act": False, "static_groups": True}, "gptq w4g32 sym"),
    ({"desc_act": True}, "gptq w4g32 sym act-order"),
    ({"act_order": True}, "gptq w4g32 sym act-order"),
    ({"act-order": True}, "gptq w4g32 sym act-order"),
    ({"actorder": "group"}, "gptq w4g32 sym act-order"),
    ({"desc_act": True, "static_groups": True}, "gptq w4g32 sym act-order static groups"),
    ({"desc_act": True, "meta": {"static_groups": True}}, "gptq w4g32 sym act-order static groups"),
    ({"actorder": "static"}, "gptq w4g32 sym act-order static groups"),
]


@pytest.mark.parametrize(("said", "label"), ORDERS)
def test_act_order_of_gptq_in_record_and_label(said, label):
    config = {**{key: value for key, value in GPTQ.items() if key != "desc_act"}, **said}
    summary = format_of(config).summary()
    assert _checkpoint_label({"quantization": summary}) == label
    assert summary["act_order"] is ("act-order" in label)
    assert summary.get("static_groups", False) is ("static" in label)


@pytest.mark.parametrize(
    ("said", "flag"),
    [
        (None, ""), (False, ""), ("weight", " act-order static groups"), ("static", " act-order static groups"),
        ("Weight", " act-order static groups"), ("group", " act-order"), ("dynamic", " act-order"), (True, " act-order"),
    ],
)  # fmt: skip
def test_act_order_of_compressed_tensors_in_record_and_label(said, flag):
    summary = format_of(ct_config({"actorder": said})).summary()
    assert _checkpoint_label({"quantization": summary}) == f"compressed-tensors w4g32 sym{flag}"


@pytest.mark.parametrize("said", ["group", "dynamic", True])
def test_groups_in_act_order_need_their_index(said):
    tensors, _ = packed_layer("compressed-tensors", MATRIX)
    with pytest.raises(CheckpointError, match="weight_g_idx: expected the tensor"):
        read(ct_config({"actorder": said}), tensors)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("strategy", "size"), [("group", 32), ("channel", None), ("tensor", None)])
def test_plain_zero_points(bits, strategy, size):
    """Before 04/2025 zero points were not packed, and of strategy tensor they never are: signed int8."""
    generator, middle = torch.Generator().manual_seed(bits), 2 ** (bits - 1)
    shape = (1,) if strategy == "tensor" else (24, 2 if size else 1)
    zeros = torch.randint(-middle, middle, shape, generator=generator).to(torch.int8)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=False, strategy=strategy, group_size=size)
    )
    state = {
        "weight": MATRIX,
        "weight_scale": torch.rand(shape, generator=generator) + 0.1,
        "weight_zero_point": zeros,
    }
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = library.compress(state, scheme)
    meant = library.decompress(packed, scheme)["weight"]
    weights = {"num_bits": bits, "symmetric": False, "strategy": strategy, "group_size": size}
    assert torch.equal(read(ct_config(weights), {**packed, "weight_zero_point": zeros}), meant)


def test_plain_zero_points_beyond_the_bits():
    tensors, _ = packed_layer("compressed-tensors", MATRIX)
    tensors["weight_zero_point"] = torch.full((24, 2), 8, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="weight_zero_point: expected numbers from -8 to 7, found 8 to 8"):
        read(ct_config({"symmetric": False}), tensors)


DENSE = {"format": "dense", "global_sparsity": 0.14, "ignore": [], "sparsity_structure": "unstructured"}
READ = {
    "dense": ct_config(sparsity_config=DENSE),
    "dense, 2:4": ct_config(sparsity_config={**DENSE, "sparsity_structure": "2:4", "global_sparsity": 0.5}),
    "no sparsity": ct_config(sparsity_config={"format": "sparse-bitmask", "global_sparsity": 0.0}),
    "empty": ct_config(sparsity_config={}, transform_config={"config_groups": {}}, ignore=None),
    "strategy left out": ct_config({"strategy": None}),
    "capitals": ct_config({"strategy": "GROUP", "type": "INT", "num_bits": "4"}),
    "format of the group": ct_config(group={"format": "pack-quantized"}, format="mixed-precision"),
    "format of the group alone": ct_config(group={"format": "pack-quantized"}, format=None),
    "a name": ct_config(group={"targets": ["model.q_proj"]}),
    "a pattern": ct_config(group={"targets": ["re:.*[qk]_proj"]}),
    "another class": ct_config(group={"targets": ["FalconLinear"]}),
    "the name in the files": ct_config(group={"targets": ["language_model.q_proj"]}),
}


@pytest.mark.parametrize("name", sorted(READ))
def test_older_configs_of_compressed_tensors(name):
    tensors, meant = packed_layer("compressed-tensors", MATRIX)
    kinds = frozenset({"FalconLinear", "Linear"})
    assert torch.equal(read(READ[name], tensors, stored="language_model.q_proj", kinds=kinds), meant)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ct_config(sparsity_config={"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}), "stored sparsely .*2:4"),
        (ct_config(sparsity_config="dense"), "sparsity_config is 'dense'; expected a JSON object"),
        (ct_config(group={"format": "float-quantized"}), "group_0: format is 'float-quantized'"),
        (ct_config(transform_config={"config_groups": {"u": {}}}), "transform_config is set"),
        (ct_config({"strategy": "block"}), "strategy 'block'"),
        (ct_config(config_groups={}), "config_groups is empty"),
        (ct_config(group={"targets": None}), "no target of quantization_config names it"),
    ],
)  # fmt: skip
def test_what_compressed_tensors_config_is_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        read(config, packed_layer("compressed-tensors", MATRIX)[0])


@pytest.mark.parametrize("said", [{"format": "gemv"}, {"checkpoint_format": "gemv"}])
def test_two_layouts_of_awq(said):
    with pytest.raises(CheckpointError, match=r"version is 'GEMM' and .*format is 'gemv'"):
        format_of({"quant_method": "awq", "bits": 4, "version": "GEMM", **said})


def test_llm_awq_is_not_autoawq():
    with pytest.raises(CheckpointError, match="backend is llm-awq"):
        format_of({"quant_method": "awq", "bits": 4, "version": "gemv", "backend": "llm-awq"})
