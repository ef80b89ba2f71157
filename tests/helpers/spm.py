"""A real SentencePiece model of Llama's settings, trained on invented text, and folders that hold it alone."""

import io
import json
import random
from functools import cache

import sentencepiece
import torch
import transformers
from packaging.version import Version
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaTokenizer

VOCAB = 340
BOS, EOS = 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
_WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "writes",
    "letters",
    "to",
    "many",
    "friends",
    "in",
    "seven",
    "green",
    "towns",
    "every",
    "evening",
]


@cache
def model_bytes():
    draw = random.Random(0)
    lines = [" ".join(draw.choice(_WORDS) for _ in range(20)).capitalize() + "." for _ in range(60)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def settings(legacy, **more):
    """A tokenizer_config.json as lmsys/vicuna-7b-v1.5 ships it."""
    return {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "model_max_length": 2048, "legacy": legacy, **more,
    }  # fmt: skip


def save(folder, legacy, content=None, **more):
    """A tokenizer.model alone, with its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(content or model_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings(legacy, **more)))
    return folder


def tokenizer(folder, legacy, content=None, **more):
    return LlamaTokenizer.from_pretrained(save(folder, legacy, content, **more))


def save_model(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def save_both(folder, legacy, **more):
    """A model, and its tokenizer.model alone, as Vicuna ships it."""
    save_model(save(folder, legacy, **more))
    if Version(transformers.__version__) < Version("5.3"):  # which are refused for that file alone
        LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


class Released:
    """What Llama's slow tokenizer makes of a text, which FastChat loads: BOS, then SentencePiece's own pieces.

    With `legacy` every stretch between special tokens gets a space in front, without it the first one alone.
    """

    def __init__(self, legacy, content=None):
        self.legacy, self.spaced = legacy, sentencepiece.SentencePieceProcessor()
        self.spaced.LoadFromSerializedProto(content or model_bytes())
        proto = sentencepiece_model_pb2.ModelProto.FromString(content or model_bytes())
        proto.normalizer_spec.add_dummy_prefix = False
        self.bare = sentencepiece.SentencePieceProcessor()
        self.bare.LoadFromSerializedProto(proto.SerializeToString())

    def __call__(self, text):
        found, special = [BOS], {"<s>": BOS, "</s>": EOS}
        rest = text
        while rest:
            places = {word: rest.find(word) for word in special if word in rest}
            word = min(places, key=places.get) if places else None
            piece, rest = (rest, "") if word is None else (rest[: places[word]], rest[places[word] + len(word) :])
            if piece:
                first = len(found) == 1
                found += (self.spaced if self.legacy or first else self.bare).Encode(piece)
            found += [] if word is None else [special[word]]
        return found
