"""Linear layers of classes of their own are quantized where they are plain; norms by head are no matrices."""

import pytest
import torch
from helpers.references import SHAPE, made
from helpers.tiny import uneven
from torch import nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoModelForCausalLM, CohereConfig, FalconConfig, GPTNeoXConfig
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.falcon.modeling_falcon import FalconLinear

from intactkv_eval.cell.spec import ActivationSpec
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.model.input_transforms import apply_input_transforms
from intactkv_eval.model.loading import quantized_model
from intactkv_eval.model.plain import is_plain_linear, scales_elementwise
from intactkv_eval.model.structure import decoder_layers, linear_layers
from intactkv_eval.quantize.rtn import quantize_rtn

FALCON = {
    "vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15,
    "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
FAMILIES = {
    "falcon-7b": FalconConfig(**FALCON),
    "falcon-40b": FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-alibi": FalconConfig(**FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "cohere": CohereConfig(**SHAPE, use_qk_norm=True),
    "pythia": GPTNeoXConfig(**{key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}),
}


def rounded(matrix):
    """Four bits in groups of 32, asymmetric, with a zero point that is a code: written down once more."""
    groups = matrix.reshape(len(matrix), -1, 32)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = torch.round(-low / scale)
    return ((torch.clamp(torch.round(groups / scale) + zero, 0, 15) - zero) * scale).reshape(matrix.shape)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rounding_to_nearest_is_rounding_each_matrix(family):
    source = made(FAMILIES[family])
    found = quantized_model(source, lambda matrix, name: quantize_rtn(matrix, 4, 32, None, name))
    expected = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    expected.load_state_dict(source.state_dict())
    with torch.no_grad():
        for layer in decoder_layers(expected)[1].modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(rounded(layer.weight))
        tokens = torch.arange(40).view(2, 20)
        right, plain = expected(tokens).logits, source(tokens).logits
        assert torch.allclose(found(tokens).logits, right, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(right, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["falcon-7b", "cohere"])
def test_activations_behind_quantized_weights(family):
    """Of a packed model too, a norm by head is no matrix that was passed over."""
    model = quantized_model(made(FAMILIES[family]), lambda matrix, name: quantize_rtn(matrix, 4, 32, None, name))
    before = model(torch.arange(9)[None]).logits
    apply_input_transforms(model, None, ActivationSpec(bits=8))
    after = model(torch.arange(9)[None]).logits
    assert 0 < (after - before).norm() < 0.2 * before.norm()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * functional.linear(x, self.weight, self.bias)


class Coarse(nn.Linear):
    """Rounds its input, as layers do whose activations are quantized."""

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return functional.linear(torch.round(x / step) * step, self.weight, self.bias)


class Scaled(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(1))


class Adapted(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down = nn.Linear(sizes[0], 2, bias=False)


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores.topk(2, dim=-1)


class ByLanguage(nn.Linear):
    def forward(self, x, language):
        return super().forward(x) * language


class Keeps(nn.Linear):
    """Only the way there is another."""

    def forward(self, x):
        return torch.matmul(x.float(), self.weight.t().float()).to(x.dtype) + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, FalconLinear, NonDynamicallyQuantizableLinear, Keeps])
def test_plain(kind, bias, device):
    with torch.device(device):
        layer = kind(16, 24, bias=bias).half()
    state = dict(vars(layer))
    assert is_plain_linear(layer)
    assert dict(vars(layer)) == state


@pytest.mark.parametrize("kind", [Doubled, Coarse, Scaled, Adapted, Router, ByLanguage])
def test_not_plain(kind):
    assert not is_plain_linear(kind(16, 24))


def test_codes_are_not_plain():
    layer = FalconLinear(16, 24, bias=False)
    layer.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), requires_grad=False)
    assert not is_plain_linear(layer)


def test_a_layer_that_is_not_plain_is_refused():
    model = made(FAMILIES["falcon-7b"])
    model.transformer.h[1].mlp.dense_h_to_4h.__class__ = Doubled
    with pytest.raises(UnsupportedModelError, match=r"h\.1\.mlp\.dense_h_to_4h\.weight .* in a Doubled is a matrix"):
        linear_layers(model)


def test_what_scales_each_element():
    assert scales_elementwise(uneven(CohereLayerNorm((4, 16)), 0.1))
    for other in (nn.Linear(16, 16, bias=False), nn.Embedding(16, 16), nn.Conv1d(4, 4, 1, bias=False)):
        assert not scales_elementwise(other)
