"""Planted pivots are found, in their layers, and models without any have none; a prefix removes those that it can."""

import json
import shutil

import pytest
import torch
from helpers.tiny import BOS, FAMILIES, build_model
from torch import nn
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.structure import decoder_layers
from intactkv_eval.pivot.discover import find, observe, received
from intactkv_eval.pivot.prefix_choice import PrefixLimits, choose, mean_nll
from intactkv_eval.pivot.prefix_file import PrefixFile

WORDS = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(3)).tolist()
PLANTED = 251


def layers_of(model):
    return list(decoder_layers(model)[1])


def planted(family):
    """A token that carries a massive activation, wherever it stands."""
    model = build_model(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS] /= 6
        model.get_input_embeddings().weight[PLANTED] *= 60
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_planted_pivot_is_found_where_it_stands(family):
    model = planted(family)
    text = [*WORDS[:10], PLANTED, *WORDS[10:]]
    seen = observe(model, layers_of(model), text)
    assert seen.magnitudes.shape == seen.share.shape == (3, 41)
    (one,) = find(seen, 4.0)
    assert (one.token, one.position) == (PLANTED, 10)
    assert one.layers
    assert one.ratio == pytest.approx(float(seen.ratios[:, 10].max()))
    assert 0 <= one.share <= 1
    assert find(observe(model, layers_of(model), WORDS), 4.0) == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_magnitudes_and_attention_are_the_models_own(family):
    """Against what transformers itself returns."""
    model = build_model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.tensor([WORDS]), output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    seen = observe(model, layers_of(model), WORDS)
    assert hooks == [dict(module._forward_hooks) for module in model.modules()]
    for layer in range(2):  # what is called the last hidden state is behind the last norm
        torch.testing.assert_close(seen.magnitudes[layer].float(), out.hidden_states[layer + 1][0].abs().amax(-1))
    for layer, weights in enumerate(out.attentions):
        for place in (0, 7, 38):
            expected = weights[0, :, place + 1 :, place].mean()
            assert float(seen.share[layer, place]) == pytest.approx(float(expected), abs=1e-6)
    assert model.config._attn_implementation == "sdpa"


def test_the_last_token_is_paid_no_attention():
    assert received(torch.eye(4)[None]).tolist() == [0, 0, 0, 0]
    assert received(torch.full((2, 4, 4), 0.25))[:3].tolist() == [0.25, 0.25, 0.25]


def test_hidden_states_that_are_no_numbers_are_refused():
    model = build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS[4]] = float("inf")
    with pytest.raises(PivotError, match="not finite"):
        observe(model, layers_of(model), WORDS)


class FirstOnly(nn.Module):
    """A layer after which the first of certain tokens in a row is massive, as content-dependent pivots are."""

    def __init__(self, layer, model, tokens):
        super().__init__()
        self.layer, self.model, self.tokens = layer, [model], tokens

    def forward(self, hidden, *args, **kwargs):
        out = self.layer(hidden, *args, **kwargs)
        ids = self.model[0].ids
        for token in self.tokens:
            places = (ids[0] == token).nonzero()[:, 0]
            if len(places):
                out = out.clone()
                out[0, places[0]] *= 50
        return out


def first_is_massive(tokens):
    """A Llama in whose second layer the first of each of `tokens` is massive."""
    model = build_model("llama")
    body = model.base_model
    body.layers[1] = FirstOnly(body.layers[1], model, tokens)
    body.register_forward_pre_hook(lambda _m, _a, k: setattr(model, "ids", k["input_ids"]), with_kwargs=True)
    return model


def texts(*tokens):
    made = []
    for number in range(8):
        draw = torch.Generator().manual_seed(number)
        text = torch.randint(0, 200, (30,), generator=draw)
        for place, token in enumerate(tokens):
            text[[4 + place, 20 + place]] = token
        made.append(text)
    return made


def test_a_prefix_takes_the_tokens_that_leave_no_pivot_behind_them():
    model = first_is_massive([210, 220])
    found = choose(model, layers_of(model), (BOS,), texts(210, 220), PrefixLimits(8.0))
    assert set(found.prefix) == {BOS, 210, 220}
    assert found.prefix[0] == BOS
    assert found.before.pivots == pytest.approx(2000 / 30)
    assert found.after.pivots == 0
    assert [rate for _, rate in found.steps] == pytest.approx([2000 / 30, 1000 / 30, 0])
    assert len(found.after.nll) == 4
    expected = mean_nll(model, found.prefix, texts(210, 220)[1])
    assert found.after.nll[0] == pytest.approx(expected)
    assert choose(model, layers_of(model), (BOS,), texts(210, 220), PrefixLimits(8.0, max_tokens=2)).prefix in {
        (BOS, 210),
        (BOS, 220),
    }


def test_nothing_is_put_in_front_where_nothing_is_gained():
    model = first_is_massive([])
    found = choose(model, layers_of(model), (BOS,), texts(210, 220), PrefixLimits(8.0))
    assert (found.prefix, found.after) == ((BOS,), found.before)
    model = planted("llama")  # massive wherever it stands: in front it changes nothing
    found = choose(model, layers_of(model), (BOS,), texts(PLANTED), PrefixLimits(4.0))
    assert found.prefix == (BOS,)
    assert found.before.pivots > 0


def test_nats_are_those_of_the_model():
    model = build_model("llama")
    with torch.no_grad():
        scores = model(torch.tensor([[BOS, *WORDS]])).logits[0].log_softmax(-1)
    expected = -sum(float(scores[i, WORDS[i]]) for i in range(1, len(WORDS))) / (len(WORDS) - 1)
    assert mean_nll(model, (BOS,), torch.tensor(WORDS)) == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("a few words, then some, and more of them, read. " * 40)
    return path


def pivots(model, prose, *more):
    options = ["--data", prose, "--samples", 4, "--length", 40, "--dtype", "float32", *more]
    return CliRunner().invoke(app, ["pivots", str(model), *map(str, options)])


def test_the_command_shows_them_and_its_file_is_a_pivot(llama, tokenizer, prose, tmp_path):
    comma = tokenizer.encode(",")[-1]
    with torch.no_grad():
        llama.get_input_embeddings().weight[comma] *= 60
    folder = tmp_path / "planted"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "choice.json"
    result = pivots(folder, prose, "--threshold", 4, "--out", out)
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if line.startswith('| ","'))
    assert row.split(" | ")[1:3] == [str(comma), "4 of 4"]
    assert "pivot=tokens:256" in result.stdout
    assert "pivots a thousand tokens" in result.stdout
    made = PrefixFile.load(out)
    assert made.tokens[0] == BOS
    lm = IntactKVLM(str(folder), pivot=str(out), dtype="float32", device="cpu")
    assert lm.pivoted_model.token_ids == made.tokens
    assert "attention" not in (tmp_path / "choice.json").read_text()
    for token in (-1, 1.0, "1", True):
        out.write_text(json.dumps({**json.loads(out.read_text()), "tokens": [token]}))
        with pytest.raises(PivotError, match="no prefix that"):
            PrefixFile.load(out)


def test_a_model_without_pivots_says_so(llama, tokenizer, prose, tmp_path):
    with torch.no_grad():
        llama.get_input_embeddings().weight[BOS] /= 6
    llama.save_pretrained(tmp_path / "even")
    tokenizer.save_pretrained(tmp_path / "even")
    result = pivots(tmp_path / "even", prose)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("no pivots")


def test_auto_is_searched_once_and_its_baseline_has_the_same_tokens(saved_llama, prose, tmp_path, monkeypatch):
    count = []
    real = choose

    def counting(*arguments):
        count.append(1)
        return real(*arguments)

    monkeypatch.setattr("intactkv_eval.pivot.auto.choose", counting)
    monkeypatch.setattr("intactkv_eval.pivot.auto.Search.__new__.__defaults__", (str(prose), 4, 40, 0, 2.0, 3, 0.1))
    own = {"dtype": "float32", "weights": "rtn", "bits": 3, "group_size": 32, "device": "cpu"}
    lm = IntactKVLM(str(saved_llama), pivot="auto", **own)
    tokens = lm.pivoted_model.token_ids
    assert tokens[0] == BOS
    baseline = IntactKVLM(str(saved_llama), pivot="auto", intact=False, **own)
    assert baseline.pivoted_model.token_ids == tokens
    assert baseline.pivoted_model.pivot is None
    assert len(count) == 1
    shutil.copytree(saved_llama, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    said = json.loads(file.read_text())
    vocab = said["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(said))
    IntactKVLM(str(saved_llama), pivot="auto", tokenizer=str(tmp_path / "other"), **own)
    assert len(count) == 2, "other texts"
    shutil.copytree(shutil.copytree(saved_llama, tmp_path / "outer"), tmp_path / "outer" / "inner")
    for _ in range(2):  # of which the folder's own files say nothing
        IntactKVLM(str(tmp_path / "outer"), pivot="auto", subfolder="inner", **own)
    assert len(count) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--threshold", 1], "threshold"),
        (["--samples", 1], "samples"),
        (["--min-reduction", 0], "min-reduction"),
        (["--out", "x.txt"], ".json"),
    ],
)
def test_bad_settings_are_named(prose, more, said):
    assert said in str(pivots("nowhere", prose, *more).exception)


@pytest.mark.parametrize("content", ["{", "{}", json.dumps({"format": "x", "tokens": [1]})])
def test_files_that_are_no_choice(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(PivotError, match=r"c\.json"):
        PrefixFile.load(tmp_path / "c.json")
    with pytest.raises(PivotError, match="does not exist"):
        PrefixFile.load(tmp_path / "other.json")


def test_auto_needs_the_full_model(tmp_path, saved_llama):
    packed = tmp_path / "packed"
    options = ["--bits", "4", "--group-size", "32", "--dtype", "float32", "--out", str(packed)]
    assert CliRunner().invoke(app, ["quantize", str(saved_llama), *options]).exit_code == 0
    result = CliRunner().invoke(app, ["pivots", str(packed)])
    assert isinstance(result.exception, ConfigError)
    assert "pivots are found in the full-precision model" in str(result.exception)
    with pytest.raises(PivotError, match="searched in the full-precision model"):
        IntactKVLM(str(packed), pivot="auto", dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match="did you mean 'auto'"):
        IntactKVLM(str(packed), pivot="aut", dtype="float32", device="cpu")
