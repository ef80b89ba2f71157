"""Real small models of every supported family, built from config."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 259  # 256 bytes, BOS, EOS, PAD
BOS, EOS, PAD = 256, 257, 258
WINDOW = 8
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.15,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "opt": lambda: OPTConfig(
        **{k: v for k, v in _SHAPE.items() if k not in {"intermediate_size", "num_key_value_heads", "initializer_range"}},
        ffn_dim=96,
        init_std=0.15,
        word_embed_proj_dim=64,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=64, n_layer=3, n_head=4, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=PAD, initializer_range=0.15,
    ),
    "phi3": lambda: Phi3Config(**_SHAPE),
}  # fmt: skip


def build_model(family, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).to(dtype).eval()
    uneven(model, 0.1)
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS] *= 6  # a pivot that matters needs some massive activation
    return model


def uneven(model, size):
    """Norm weights of one hide a norm that is left out, biases of zero a bias."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(size * torch.randn_like(parameter))
    return model


CHAT_TEMPLATE = (
    "{{ bos_token }}Be kind.\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_tokenizer():
    """A real tokenizer of bytes, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    made.chat_template = CHAT_TEMPLATE
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (BOS, EOS, PAD)
    return made
