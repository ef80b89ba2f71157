"""The BOS of chat prompts is the one that the tokenizer adds, on every way from a conversation to tokens.

The tokenizers are a SentencePiece model alone in a folder, as Vicuna ships it, with `legacy` both ways; what tokens are
right SentencePiece itself says (tests/helpers/spm.py).
"""

import copy

import pytest
import torch
import transformers
from helpers import spm
from helpers.tiny import BOS, byte_tokenizer
from lm_eval.models.huggingface import HFLM
from packaging.version import Version
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from intactkv_eval.assemble.load_errors import check_words
from intactkv_eval.chat.bos_text import bos_changes_tokens, encoded_prompt
from intactkv_eval.chat.conversations import Conversations
from intactkv_eval.chat.messages import Message
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import CheckpointError, PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.lm.multi_turn import REQUEST
from intactkv_eval.pivot.tokens import prompt_head, use_chat_template
from intactkv_eval.training.examples import examples_of, rendered

OWN = spm.TEMPLATE
TEMPLATES = {"own": OWN, "vicuna_v1.1": None, "llama-2": None}
TALK = [Message("user", "Quick towns?"), Message("assistant", "Seven green."), Message("user", "And the fox?")]
LEGACY = [True, False]


@pytest.fixture(params=LEGACY, ids=["legacy", "not legacy"])
def legacy(request):
    return request.param


@pytest.fixture
def folder(tmp_path, legacy):
    """A model, and its tokenizer.model alone."""
    return spm.save_both(tmp_path / "m", legacy, chat_template=OWN)


def made_of(folder, template="own", **cell):
    named = {} if template == "own" else {"chat_template": template}
    return IntactKVLM(str(folder), device="cpu", dtype="float32", **named, **cell)


def instances(kind, arguments):
    return [make_request(kind, args, place) for place, args in enumerate(arguments)]


def text_of(lm, talk=TALK):
    return rendered(talk, lm.tokenizer, invite=True)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_way_to_tokens_is_the_released_one(folder, legacy, template):
    lm = made_of(folder, template, pivot="prompt")
    right = spm.Released(legacy)(text_of(lm).removeprefix("<s>"))
    head = lm.pivoted_model.token_ids
    assert tuple(right[: len(head)]) == head == prompt_head(lm.tokenizer)
    assert len(head) > 2
    messages = [one._asdict() for one in TALK]
    asked = lm.ask(lm._talk({"messages": messages, "max_gen_toks": 4}), [])
    first = spm.Released(legacy)(text_of(lm, TALK[:1]).removeprefix("<s>"))
    answered = lm.ask(lm._talk({"messages": [messages[0], messages[2]], "max_gen_toks": 4}), ["Seven green."])
    assert [*head, *answered.body] == right, "MT-Bench's conversations"
    assert asked.body == right[len(head) :], "the answer is there already"
    text = lm.apply_chat_template(messages)
    assert lm.tok_encode(text) == right, "--apply_chat_template"
    ids, _ = lm.tok_batch_encode([text, lm.apply_chat_template(messages[:1])])
    assert [*head, *ids[0].tolist()] == right
    assert ids[1].tolist()[-len(first) + len(head) :] == first[len(head) :]
    context, _ = lm._encode_pair(text, " seven")
    assert context == right
    assert lm.framing.counts["stripped"] == 4


def test_calibration_sees_the_same_tokens(tmp_path, legacy):
    tokenizer = spm.tokenizer(tmp_path, legacy, chat_template=OWN)
    said = Conversations.of([tuple(TALK[:2])], "x")
    (found,) = examples_of(said, tokenizer, list, least_counted=2)
    text = rendered(TALK[:2], tokenizer)
    assert found.body.tolist() == spm.Released(legacy)(text.removeprefix("<s>"))
    assert tokenizer.decode(found.body[found.counted]).strip() == "Seven green."


def test_log_likelihoods_are_those_of_the_released_tokens(folder, legacy):
    """pivot=none beside plain transformers; and law 6: on texts without BOS it is lm_eval's `hf`."""
    lm = made_of(folder, pivot="none")
    hf = HFLM(pretrained=str(folder), device="cpu", dtype="float32")
    plain = [("", "A fox"), ("A quick fox", " jumps"), ("the", " dog")]
    ours, theirs = (one.loglikelihood(instances("loglikelihood", plain), disable_tqdm=True) for one in (lm, hf))
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    chat = lm.apply_chat_template([TALK[0]._asdict()])
    ((found, _),) = lm.loglikelihood(instances("loglikelihood", [(chat, " seven")]), disable_tqdm=True)
    right = spm.Released(legacy)(f"{chat} seven".removeprefix("<s>"))
    start = len(spm.Released(legacy)(chat.removeprefix("<s>")))
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([right])).logits[0].log_softmax(-1)
    expected = sum(float(logits[place - 1, right[place]].detach()) for place in range(start, len(right)))
    assert found == pytest.approx(expected, abs=1e-4)
    ((other, _),) = hf.loglikelihood(instances("loglikelihood", [(chat, " seven")]), disable_tqdm=True)
    assert (found == pytest.approx(other, abs=1e-4)) is legacy, "`hf` takes BOS as text"


@pytest.mark.parametrize("kept", [True, False])
def test_a_conversation_goes_on_behind_an_empty_answer(folder, legacy, kept):
    """Nothing is said first, since what it would say is a stop string; the second turn's tokens are FastChat's."""
    lm = made_of(folder, "vicuna_v1.1", pivot="prompt", share_prefix=kept)
    options = {"messages": [TALK[0]._asdict(), TALK[2]._asdict()], "max_gen_toks": 6}
    ((whole, *_),) = lm.generate_turns(instances(REQUEST, [("", options)]), True)
    stop = lm.tok_decode([lm.tokenizer.encode(whole[0], add_special_tokens=False)[0]]).strip()[:1] or whole[0][:1]
    (turns,) = lm.generate_turns(instances(REQUEST, [("", {**options, "until": [stop]})]), True)
    assert [turns[0][0], turns[0][2]] == ["", "stop"]
    assert turns[1][1] == f"{turns[0][1]}USER: And the fox? ASSISTANT:"
    ids = torch.tensor([spm.Released(legacy)(turns[1][1].removeprefix("<s>"))])
    out = AutoModelForCausalLM.from_pretrained(folder).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    said = lm.tok_decode(out[0, ids.shape[1] :].tolist())
    assert turns[1][0] == (said[: said.find(stop)] if stop in said else said).strip()


def test_a_message_that_runs_into_the_head_is_still_told_from_another_head(folder, legacy):
    """The head as text begins with a space, which no prompt has."""
    lm = made_of(folder, pivot="prompt")
    text = lm.tokenizer.decode(lm.pivoted_model.token_ids)
    letters = [lm.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in f"{text[3:]}x".encode()]
    lm.check_head("<s>[user] x", [spm.BOS, *letters])
    assert lm.framing.counts == {"two_heads": 1}
    with pytest.raises(PivotError, match="begins otherwise"):
        lm.check_head("<s>[system] x", spm.Released(legacy)("[system] x"))


BOS_ADDED = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
BOS_AND_EOS_ADDED = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", BOS + 1)])


@pytest.mark.parametrize("added", [None, BOS_ADDED, BOS_AND_EOS_ADDED], ids=["none", "bos", "bos and eos"])
@pytest.mark.parametrize("text", ["<s>hi", "<s> hi", "<s><s>hi", "<s>", "hi</s><s>"])
def test_tokenizers_of_bytes_make_the_same_of_both(added, text):
    """As Gemma's and Llama 3's do, and ChatML's whose BOS no tokenizer adds: nothing changes."""
    tokenizer = byte_tokenizer()
    if added is not None:
        tokenizer.backend_tokenizer.post_processor = added
    wanted = tokenizer.encode(text, add_special_tokens=not text.startswith("<s>"))
    assert encoded_prompt(tokenizer, text) == wanted
    assert not bos_changes_tokens(tokenizer)
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    assert encoded_prompt(bare, text) == bare.encode(text)


def test_a_bos_that_a_template_writes_twice_stays_twice(tmp_path, legacy):
    tokenizer = spm.tokenizer(tmp_path, legacy)
    assert encoded_prompt(tokenizer, "<s><s>A fox") == spm.Released(legacy)("<s>A fox")
    assert encoded_prompt(tokenizer, "<s>") == [spm.BOS]


def test_an_eos_that_a_tokenizer_adds_ends_no_prompt(tmp_path, legacy):
    tokenizer = spm.tokenizer(tmp_path, legacy, add_eos_token=True)
    assert tokenizer.encode("A fox")[-1] == spm.EOS
    assert encoded_prompt(tokenizer, "<s>A fox") == spm.Released(legacy)("A fox")


def test_a_tokenizer_that_adds_no_bos_is_taken_at_its_templates_word(tmp_path, legacy):
    """Its model was made with BOS as text, but for the shipped templates, whose released prompts hold none."""
    tokenizer = spm.tokenizer(tmp_path, legacy, add_bos_token=False, chat_template=OWN)
    assert tokenizer.encode("A fox")[0] != spm.BOS
    assert encoded_prompt(tokenizer, "<s>A fox") == tokenizer.encode("<s>A fox")
    use_chat_template(tokenizer, "vicuna_v1.1")
    assert encoded_prompt(tokenizer, "<s>A fox") == spm.Released(legacy)("A fox")


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_folder_that_transformers_reads_wrongly_is_refused(tmp_path, legacy, unknown):
    """As its releases before 5.3 read Llama's: letters alone, spaces unknown (5.0, 5.1) or left out (5.2)."""
    right = spm.tokenizer(tmp_path / "right", legacy)
    folder = spm.save(tmp_path / "m", legacy)
    check_words(right, str(folder), "main")
    words = models.BPE(vocab=right.get_vocab(), merges=[], unk_token=unknown)
    wrong = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    with pytest.raises(CheckpointError, match=r"loses words of .* install transformers from 5\.3 on"):
        check_words(wrong, str(folder), "main")
    (folder / "tokenizer.json").write_text("{}")
    check_words(wrong, str(folder), "main")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's, as Llama 3 ships it
    check_words(wrong, str(folder), "main")


@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.3"), reason="it reads a tokenizer.model alone")
def test_before_5_3_a_tokenizer_model_alone_is_refused(tmp_path, legacy):
    folder = spm.save_model(spm.save(tmp_path / "m", legacy))
    with pytest.raises(CheckpointError, match="loses words"):
        made_of(folder)
