"""llm-awq's search results: what is no such file, and scales that would make another model of it."""

import copy

import pytest
import torch
from helpers.tiny import FAMILIES, uneven
from transformers import AutoModelForCausalLM, NemotronConfig

from intactkv_eval.errors import CheckpointError
from intactkv_eval.quantize.awq_search import apply_scales, load_search

LAYER = "model.layers.1"
QKV = tuple(f"{LAYER}.self_attn.{part}_proj" for part in "qkv")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def small(family, dtype=torch.float32, **changes):
    """With as many kv heads as heads, so that V has a scale."""
    config = FAMILIES[family]()
    for key, value in {"num_key_value_heads": 4, **changes}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return uneven(AutoModelForCausalLM.from_config(config).to(dtype).eval(), 0.3)


def searched(file, *scales, clips=()):
    torch.save({"scale": list(scales), "clip": list(clips)}, file)
    return load_search(file)


def drawn(width=64):
    return torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(1)))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "phi3"])
def test_scales_of_every_reader_are_folded(family, dtype, tmp_path):
    model = small(family, dtype)
    attention, mlp = f"{LAYER}.self_attn", f"{LAYER}.mlp"
    norm = {"gemma3": "pre_feedforward_layernorm"}.get(family, "post_attention_layernorm")
    of_llama = [
        (f"{LAYER}.input_layernorm", QKV, drawn()),
        (f"{attention}.v_proj", (f"{attention}.o_proj",), drawn()),
        (f"{LAYER}.{norm}", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), drawn()),
        (f"{mlp}.up_proj", (f"{mlp}.down_proj",), drawn(96)),
    ]
    block = "model.decoder.layers.1"
    scales = {
        "phi3": [
            (f"{LAYER}.input_layernorm", (f"{attention}.qkv_proj",), drawn()),
            (f"{attention}.qkv_proj", (f"{attention}.o_proj",), drawn()),
            (f"{mlp}.gate_up_proj", (f"{mlp}.down_proj",), drawn(96)),
        ],
        "opt": [
            (f"{block}.self_attn_layer_norm", tuple(f"{block}.self_attn.{part}_proj" for part in "qkv"), drawn()),
            (f"{block}.self_attn.v_proj", (f"{block}.self_attn.out_proj",), drawn()),
            (f"{block}.final_layer_norm", (f"{block}.fc1",), drawn()),
            (f"{block}.fc1", (f"{block}.fc2",), drawn(96)),
        ],
    }.get(family, of_llama)
    expected, before = logits(model), copy.deepcopy(model.state_dict())
    apply_scales(model, searched(tmp_path / "s.pt", *scales))
    bound = 1e-4 if dtype == torch.float32 else 0.1
    assert (logits(model) - expected).norm() < bound * expected.norm()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert all(f"{name}.weight" not in same for front, names, _ in scales for name in (front, *names))
    assert not any(getattr(module, kind) for module in model.modules() for kind in HOOKS)


@pytest.mark.parametrize(
    ("family", "changes", "scale", "said"),
    [
        ("llama", {}, (f"{LAYER}.input_layernorm", QKV[:1], 64), "1.self_attn.k_proj gets other inputs"),
        ("qwen2", {}, (f"{LAYER}.input_layernorm", QKV[1:], 64), "1.self_attn.q_proj gets other inputs"),
        ("llama", {}, (f"{LAYER}.input_layernorm", QKV + QKV[:1], 64), "1.self_attn.q_proj gets other inputs"),
        ("llama", {}, (f"{LAYER}.mlp.gate_proj", (f"{LAYER}.mlp.down_proj",), 96), "mlp.down_proj gets other inputs"),
        ("llama", {}, ("model.norm", (f"{LAYER}.mlp.up_proj",), 64), "mlp.up_proj gets other inputs"),
        ("opt", {"do_layer_norm_before": False}, ("model.decoder.layers.1.final_layer_norm", ("model.decoder.layers.2.self_attn.q_proj",), 64), "2.self_attn.k_proj gets"),
        ("opt", {"activation_function": "gelu"}, ("model.decoder.layers.1.fc1", ("model.decoder.layers.1.fc2",), 96), "1.fc2 gets other inputs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_change_the_model(family, changes, scale, said, dtype, tmp_path):
    model = small(family, dtype, **changes)
    before = copy.deepcopy(model.state_dict())
    front, names, width = scale
    with pytest.raises(CheckpointError, match=said):
        apply_scales(model, searched(tmp_path / "s.pt", (front, names, drawn(width))))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(getattr(module, kind) for module in model.modules() for kind in HOOKS)


def test_a_norm_that_does_not_multiply_by_its_weights_alone(tmp_path):
    """Nemotron's multiplies by 1 + weight, as Gemma's does, which is known."""
    config = NemotronConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(CheckpointError, match=r"NemotronLayerNorm1P.* does not multiply by its weights alone"):
        apply_scales(model, searched(tmp_path / "s.pt", (f"{LAYER}.input_layernorm", QKV, drawn())))


@pytest.mark.parametrize(
    "scale",
    [
        torch.zeros(64), -torch.ones(64), torch.ones(1, 64), torch.ones(64, dtype=torch.complex64),
        torch.ones(64, dtype=torch.long), torch.ones(64).to_sparse(), torch.full((64,), 1e300, dtype=torch.float64),
    ],
)  # fmt: skip
def test_what_is_no_scale(scale, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected the lists `scale` and `clip`|it names torch"):
        searched(tmp_path / "s.pt", (f"{LAYER}.input_layernorm", QKV, scale))
    with pytest.raises(CheckpointError, match="a scale without layers"):
        searched(tmp_path / "s.pt", (f"{LAYER}.input_layernorm", (), torch.ones(64)))


@pytest.mark.parametrize(
    "clip",
    [
        torch.tensor(1.0), torch.ones(64), torch.ones(64, 0, 1), torch.ones(64, 2, 3), -torch.ones(64, 2, 1),
        torch.ones(64, 2, 1, dtype=torch.complex64),
    ],
)  # fmt: skip
def test_what_is_no_clip(clip, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected the lists `scale` and `clip`|it names torch"):
        searched(tmp_path / "s.pt", clips=[(QKV[0], clip)])
