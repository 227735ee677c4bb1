"""torch's own OpInfo samples for scaled_dot_product_attention, and the grouped ones it leaves out.

The samples are those that torch's test suite draws: 3-D, 4-D, and a 3-D query with 4-D K and V,
causal or not, with and without dropout, and one float mask; values up to 9, logits of some 200.
`enable_gqa` is in the generator's signature and in none of its samples, so those are added here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from bench.contract.call import FLOATS, Call
from bench.contract.cases import Case
from bench.contract.inputs import Random

FAMILY = "opinfo"
NAMES = {
    "attn_mask": "mask",
    "dropout_p": "dropout",
    "is_causal": "causal",
    "scale": "scale",
    "enable_gqa": "gqa",
}
PLACES = ("key", "value", "mask", "dropout", "causal")


def opinfo_cases(seed: int) -> list[Case]:
    """Every sample of every float dtype. Raises ImportError with the remedy."""
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError as error:
        raise ImportError(f"torch's test samples need `pip install expecttest`: {error}") from error
    (info,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    found = []
    for dtype in FLOATS:
        torch.manual_seed(seed)
        for index, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=False)):
            found.append(_case(f"torch{index}", seed, dtype, _call(sample)))
        found += [_case(name, seed, dtype, call) for name, call in grouped(seed, dtype)]
    return found


def grouped(seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Samples of the same size and range with fewer KV heads, which torch's never are."""
    axes = itertools.product((1, 2), (False, True), (0.0, 0.5), (False, True))
    for index, (kv_heads, causal, dropout, masked) in enumerate(axes):
        if causal and masked:
            continue
        random = Random(seed, f"grouped{index}")
        shapes = ((4, 4, 3, 8), (4, kv_heads, 6, 8), (4, kv_heads, 6, 8))
        query, key, value = ((18 * random.uniform(*shape) - 9).to(dtype) for shape in shapes)
        mask = random.uniform(4, 1, 3, 6) < 0.6 if masked else None
        yield f"grouped{index}", Call(query, key, value, mask, dropout, causal, gqa=True)


def _call(sample: Any) -> Call:
    given = dict(zip(PLACES, sample.args, strict=False))
    given |= {NAMES[name]: value for name, value in sample.kwargs.items()}
    return Call(sample.input, **given)


def _case(name: str, seed: int, dtype: torch.dtype, call: Call) -> Case:
    shown = f"{name}[{str(dtype).removeprefix('torch.')},p={call.dropout},causal={call.causal}]"
    return Case(FAMILY, shown, seed, lambda _: call)
