"""Tokenizers that merge over the border of context and continuation: hf's numbers, or a message that says so."""

import pytest
import torch
from helpers.tiny import BOS, EOS, PAD
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from intactkv_eval.compat.lm_eval_api import HFLM, make_request
from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.intactkv_lm import IntactKVLM

MERGES = [("a", "b"), ("Ġ", "c"), ("ab", "d"), ("Ċ", "Ċ")]


def bytes_that_merge():
    vocab = {one: place for place, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<s>": BOS, "</s>": EOS, "<pad>": PAD} | {a + b: 259 + place for place, (a, b) in enumerate(MERGES)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return core


def sentencepiece_of_old():
    """Llama's legacy layout: a space in front of every text, spaces as ▁, unknown letters as bytes."""
    letters = ["▁", *"abcdehlnorstuw", "▁a", "▁ab", "ab", "th", "▁th", "he", "▁the"]
    vocab = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, **{f"<0x{byte:02X}>": byte for byte in range(256)}}
    vocab |= {piece: 259 + place for place, piece in enumerate(letters)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("t", "h"), ("▁", "th"), ("h", "e"), ("▁th", "e")]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


def stripping():
    core = bytes_that_merge()
    core.normalizer = normalizers.Strip()
    return core


def saved(core, folder):
    core.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in ("<s>", "</s>", "<pad>")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, **shape, bos_token_id=BOS, eos_token_id=EOS, initializer_range=0.15)
    LlamaForCausalLM(config).save_pretrained(folder)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.save_pretrained(folder)
    return str(folder)


def scores(lm, pairs):
    asked = [make_request("loglikelihood", pair, place, task="merging") for place, pair in enumerate(pairs)]
    return [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]


PAIRS = [
    ("xa", "bc"), ("x ", "c"), ("x\n", "\n"), ("x", "abd"), ("xa ", " c"), ("", "ab"), ("", "<s>a"), ("<s>", "a"),
    (" ", "c"), ("   ", "c"), ("the ", "abe"), ("t", "he"), ("the é", "ß"), ("<s>xa", "bc"), ("x  ", "  the"),
]  # fmt: skip


@pytest.mark.parametrize("core", [bytes_that_merge, sentencepiece_of_old], ids=lambda core: core.__name__)
def test_merged_pairs_have_the_numbers_of_hf(core, tmp_path):
    folder = saved(core(), tmp_path)
    plain = HFLM(pretrained=folder, device="cpu", batch_size=1)
    pairs = [pair for pair in PAIRS if pair[0] in {"", " ", "   "} or plain._encode_pair(*pair)[1]]
    assert len(pairs) > 10
    expected = scores(plain, pairs)
    for cell in ({"pivot": "none"}, {"pivot": "bos"}, {"pivot": "bos", "share_prefix": False}):
        lm = IntactKVLM(pretrained=folder, device="cpu", batch_size=8, **cell)
        assert scores(lm, pairs) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("core", "pair", "message"),
    [
        (
            bytes_that_merge,
            ("xa", "b"),
            "the continuation 'b' has no token of its own behind the context 'xa'.*into 'ab'",
        ),
        (bytes_that_merge, ("<s>xab", "d"), "'d' has no token of its own behind the context '<s>xab'.*into 'abd'"),
        (sentencepiece_of_old, ("a", "b"), "'b' has no token of its own behind the context 'a'"),
        (bytes_that_merge, ("", "<s>"), "the continuation '<s>' is the token that stands in front of every text"),
        (stripping, ("x", " "), "makes no token of the continuation ' ' behind the context 'x'"),
        (stripping, ("", " "), "task merging: the tokenizer makes no token of the continuation ' '"),
    ],
)
def test_a_continuation_without_a_token_of_its_own_is_told_why(core, pair, message, tmp_path):
    """lm_eval's hf has no number for these either."""
    folder = saved(core(), tmp_path)
    with pytest.raises((AssertionError, IndexError)):
        scores(HFLM(pretrained=folder, device="cpu", batch_size=1), [pair])
    with pytest.raises(ConfigError, match=message):
        scores(IntactKVLM(pretrained=folder, device="cpu", pivot="bos", batch_size=2), [("x", "y"), pair])
