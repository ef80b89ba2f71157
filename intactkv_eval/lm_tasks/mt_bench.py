"""MT-Bench and its like, as a task of lm_eval: every question is a conversation that the model answers turn by turn.

The request type is `generate_turns`, which the model class `intactkv` knows. The task itself measures how long answers
are and how many were cut; what they are worth, `intactkv judge` finds out from the logged samples.

    --metadata '{"seed": 43, "num_choices": 2, "questions": "FOLDER"}'
    --gen_kwargs max_gen_toks=1024,temperature=0     (temperature: for all categories, instead of each one's own)
"""

from typing import Any

from datasets import Dataset

from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import ConfigError, unknown_key
from intactkv_eval.lm.multi_turn import OPTIONS, REQUEST, number
from intactkv_eval.lm_tasks.python_task import PythonTask
from intactkv_eval.mt_bench.questions import Question, load_questions

SEED = 42
MOST_TOKENS = 1024
_KWARGS = tuple(key for key in OPTIONS if key not in {"messages", "seed"})


class MTBenchTask(PythonTask):
    """A bench of open questions. The YAML's metadata names it: `bench: mt_bench`."""

    _system: str | None = None

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """The questions. Raises DataError where they cannot be had, ConfigError for a wrong number of choices."""
        metadata = self.config.metadata
        found = load_questions(metadata["bench"], metadata.get("questions"))
        self._choices = number("num_choices", metadata.get("num_choices", 1), int)
        if self._choices < 1:
            raise ConfigError(f"num_choices={metadata['num_choices']!r}: use a whole number from 1")
        self._seed = number("seed", metadata.get("seed", SEED), int)
        metadata |= {"seed": self._seed, "data": f"sha256:{found.digest}", "protocol": metadata["bench"]}
        rows = [one.model_dump(mode="json") for one in found.questions]
        self.dataset = {"test": Dataset.from_list(rows)}

    def build_all_requests(self, *, system_instruction: str | None = None, **options: Any) -> None:
        """A system instruction is the conversation's first message."""
        self._system = system_instruction
        super().build_all_requests(**options)

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        """The first question."""
        return str(doc["turns"][0])

    def doc_to_target(self, doc: dict[str, Any], doc_to_target: Any = None) -> str:
        """Nothing is right beforehand."""
        return ""

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        """The first question; the chat template is the model's to apply, in every turn."""
        return self.doc_to_text(doc)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Any]:
        """One conversation for each choice."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        asked = [{"role": "user", "content": turn} for turn in doc["turns"]]
        options = {"messages": system + asked, **self._generation(doc)}
        return [
            make_request(
                REQUEST,
                (ctx, {**options, "seed": f"{self._seed}/{doc['question_id']}/{index}"}),
                index,
                doc,
                self.config.task,
                kwargs,
            )
            for index in range(self._choices)
        ]

    def _generation(self, doc: dict[str, Any]) -> dict[str, Any]:
        given = dict(self.config.generation_kwargs or {})
        sampled = given.pop("do_sample", True)
        for key in given:
            if key not in _KWARGS:
                raise unknown_key(key, _KWARGS)
        own = Question.model_validate(doc).temperature if sampled else 0.0
        return {"max_gen_toks": MOST_TOKENS, "temperature": own, **given}


def lengths(doc: dict[str, Any], results: list[list[list[Any]]]) -> dict[str, float]:
    """process_results: of all turns of all choices the mean tokens, the share that was cut, and that is empty."""
    turns = [turn for choice in results for turn in choice]
    return {
        "answer_tokens": sum(tokens for *_, tokens in turns) / len(turns),
        "cut_answers": sum(ended == "length" for _, _, ended, _ in turns) / len(turns),
        "empty_answers": sum(not text for text, *_ in turns) / len(turns),
    }
