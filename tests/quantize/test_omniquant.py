"""OmniQuant: what is learned lowers the block's error below RTN's; ranges and gradients are those of the formula."""

import pytest
import torch
from helpers.blocks import error_of, make_block, output_error, outputs, planted_block
from helpers.tiny import build_model

from intactkv_eval.errors import ConfigError, UnsupportedModelError
from intactkv_eval.quantize.omniquant import OmniQuant
from intactkv_eval.quantize.rtn import fake_quantize, group_range, quantize_in_range, quantize_rtn


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "opt", "phi3"])
def test_below_rtn(family):
    plain = error_of(None, family)
    assert error_of(OmniQuant(3, 32, epochs=6), family) < 0.75 * plain


def test_each_part_lowers_the_error():
    """Clipping alone without salient channels; scaling alone with them."""

    def error(method):
        block = make_block(build_model("llama"), samples=8)
        expected = outputs(block)
        method.quantize(block)
        return output_error(block, expected)

    start = error(OmniQuant(2, 32, epochs=1, lwc_lr=1e-9, let=False))
    assert error(OmniQuant(2, 32, epochs=10, let=False, lwc_lr=0.1)) < 0.9 * start
    assert error_of(OmniQuant(3, 32, epochs=2, lwc=False), "llama") < 0.75 * error_of(None, "llama")


def test_more_epochs_are_never_worse():
    """The best epoch is kept, and a learning rate that wrecks the block leaves its start."""
    errors = [error_of(OmniQuant(3, 32, epochs=n, second_target=False), "opt") for n in (1, 4, 8)]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < errors[0]
    start = error_of(OmniQuant(3, 32, epochs=1, lwc_lr=1e-9, let_lr=1e-9, second_target=False), "opt")
    wild = error_of(OmniQuant(3, 32, epochs=1, lwc_lr=30.0, let_lr=1e-9, second_target=False), "opt")
    assert wild <= start * (1 + 1e-5)


def test_targets():
    """x_Q is not x: the first target corrects for it, the second holds what the block does with x_Q itself."""
    torch.manual_seed(0)

    def error(second, against_full):
        full = list(make_block(build_model("llama")).inputs)
        block = make_block(build_model("llama"), full_inputs=full)
        clean = outputs(block)
        block.inputs[:] = [
            hidden + 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(i))
            for i, hidden in enumerate(full)
        ]
        own = outputs(block)
        OmniQuant(3, 32, epochs=4, second_target=second).quantize(block)
        return output_error(block, clean if against_full else own)

    assert error(False, True) < error(True, True)
    assert error(True, False) < error(False, False)


def test_mlp_output_is_not_scaled():
    """As in the paper: up_proj's rows stay in proportion, so that only what is before the MLP has changed."""
    block = planted_block()
    before = block.layers["mlp.up_proj"].weight.detach().clone()
    norm = block.module.post_attention_layernorm.weight.detach().clone()
    found = OmniQuant(8, 32, epochs=1, lwc=False).quantize(block)
    scale = norm / block.module.post_attention_layernorm.weight.detach()
    assert scale.log().std() > 0.1
    torch.testing.assert_close(
        found["mlp.up_proj"].dequantize(torch.float32), before * scale, rtol=0, atol=0.02 * float(scale.max())
    )


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"lwc_lr": 0.0}, "lwc_lr=0.0"),
        ({"let_lr": float("nan")}, "let_lr=nan"),
        ({"let": False, "lwc": False}, "nothing is learned"),
    ],
)
def test_what_is_no_setting(setting, said):
    with pytest.raises(ConfigError, match=said):
        OmniQuant(4, 32, **setting)


def test_what_it_needs():
    block = planted_block()
    object.__setattr__(block, "full_inputs", None)
    with pytest.raises(ConfigError, match=r"model\.layers\.1 comes without the full-precision model's inputs"):
        OmniQuant(4, 32).quantize(block)
    with pytest.raises(ConfigError, match=r"the loss in model\.layers\.1 is (nan|inf) after 1 epochs: lower lwc_lr"):
        OmniQuant(4, 32, epochs=3, let_lr=1e6).quantize(planted_block())


@pytest.mark.parametrize("symmetric", [None, "gptq", "omniquant"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ranges(bits, symmetric):
    """In the range of RTN it is RTN; in a narrower one what is beyond gets the outermost codes; unpacked the same."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    low, high = group_range(weight, 16)
    same = quantize_in_range(weight, (low, high), bits, 16, torch.float16, symmetric)
    assert same.digest() == quantize_rtn(weight, bits, 16, symmetric, scale_dtype=torch.float16).digest()
    narrow = quantize_in_range(weight, (low / 2, high / 3), bits, 16, torch.float16, symmetric)
    fake = fake_quantize(weight, low / 2, high / 3, bits, 16, torch.float16, symmetric)
    assert torch.equal(fake, narrow.dequantize(torch.float32))
    steps = narrow.scales.float().repeat_interleave(16, dim=1)
    reach = torch.maximum(-low / 2, high / 3) if symmetric else None
    least = (-reach if symmetric else low / 2).repeat_interleave(16, dim=1)
    most = (reach if symmetric else high / 3).repeat_interleave(16, dim=1)
    assert (fake >= least - 1.1 * steps).all()  # OmniQuant's lowest code lies a step below its reach
    assert (fake <= most + steps).all()
    inside = (weight > least + steps) & (weight < most - steps)
    assert ((fake - weight).abs()[inside] <= 0.501 * steps[inside]).all()


def test_gradients():
    """Of the weight: 1 inside of the range, 0 beyond it. Of the range, whose zero point stays where it is: a wider step
    moves what is beyond, in proportion to its code; what is inside only by its rounding."""
    torch.manual_seed(0)
    weight = torch.randn(3, 32, requires_grad=True)
    low, high = (bound.detach().mul(0.5).requires_grad_() for bound in group_range(weight, 16))
    probe = torch.randn(3, 32)
    found = fake_quantize(weight, low, high, 8, 16, torch.float32, None)
    of_weight, of_low, of_high = torch.autograd.grad((found * probe).sum(), (weight, low, high))
    above, below = weight > high.repeat_interleave(16, 1), weight < low.repeat_interleave(16, 1)
    assert above.any()
    assert below.any()
    torch.testing.assert_close(of_weight, probe.masked_fill(above | below, 0), rtol=0, atol=1e-5)
    share = (high / (high - low)).detach().repeat_interleave(16, 1)
    expected = (probe * (above * share - below * (1 - share))).view(3, 2, 16).sum(dim=-1)
    torch.testing.assert_close(of_high, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(of_low, -of_high)


def test_conv1d_is_refused():
    block = make_block(build_model("gpt2"))
    layers = dict(block.module.named_modules())
    object.__setattr__(block, "layers", {"mlp.c_fc": layers["mlp.c_fc"]})
    with pytest.raises(UnsupportedModelError, match=r"mlp\.c_fc is a Conv1D"):
        OmniQuant(4, 32, let=False).quantize(block)
