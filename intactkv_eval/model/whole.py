"""Loading that fails where a checkpoint is not whole: transformers itself fills what is missing with random numbers."""

from typing import Any

from intactkv_eval.errors import CheckpointError


class WholeCheckpoint:
    """An auto class of transformers whose `from_pretrained` raises CheckpointError for a missing tensor."""

    def __init__(self, auto_class: Any) -> None:
        self._auto_class = auto_class

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """The model, every tensor of which came from the checkpoint (or is tied to one that did)."""
        try:
            model, found = self._auto_class.from_pretrained(name, output_loading_info=True, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise CheckpointError(f"{name}: a tensor has not the shape that config.json says; see the report") from None
        missing = sorted(found["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{name}: {len(missing)} tensors are missing from the checkpoint and would be filled with random "
                f"numbers: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            )
        return model
