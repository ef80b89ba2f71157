"""The one table of tolerances for kernels: relative RMS error against the fp32 reference, by the dtype of x.

About twice what is seen. fp32 is the order of summation. 16 bits is the rounding of y and, in prefill, of the weights;
bf16 leaves room for Triton's interpreter, which cuts off where a GPU rounds.
"""

import torch

RELATIVE_RMS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}


def relative_rms(found, expected):
    """RMS of found - expected, relative to the RMS of expected; NaN where found holds a NaN."""
    difference = found.double() - expected.double()
    return (difference.square().mean().sqrt() / expected.double().square().mean().sqrt()).item()
