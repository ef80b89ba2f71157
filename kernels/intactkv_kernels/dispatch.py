"""Which implementation runs a quantized linear layer.

    dense   the weight is dequantized once, when the model is loaded; then torch's own matrix product. Any device, any
            dtype; the memory of the full-precision model.

`auto` takes the fastest that is built for the device. Today that is `dense` everywhere.
"""

BACKENDS = ("dense",)


def choose_backend(requested: str) -> str:
    """The backend that will run for `requested` ("auto" or one of BACKENDS). Raises ValueError for any other name."""
    if requested == "auto":
        return "dense"
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r} is not one of auto, {', '.join(BACKENDS)}")
    return requested
