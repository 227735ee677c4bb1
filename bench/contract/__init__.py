"""A conformance suite for replacements of torch.nn.functional.scaled_dot_product_attention.

    from bench.contract import examine, suite

    report = examine(my_attention, suite(seed=0, quick=True), seed=0)
    print(report.digest())

What is compared, and with what:

    refusals    calls that torch refuses: class and subject of the error
    laws        overrides, autograd, transforms, tracing, autocast, backends, dropout, threads
    opinfo      torch's own samples in four dtypes, and grouped ones that it lacks
    grid        shapes, masks, scales, memory layouts, values at the edge of a dtype

Truth is float64; torch's own error sets the tolerance (`judge`). Where torch's CPU kernels are
wrong or read out of bounds the contract says what is right instead:

    K and V of different lengths            RuntimeError
    a mask together with is_causal=True     RuntimeError
    a float32 mask for float64 tensors      added as it is
    is_causal with scale <= 0               the truth, or the NaN that torch gives
    NaN behind a mask                       hidden, or leaked where torch leaks it

`controls` holds implementations with one flaw each, which the suite must see, and `honest` those
that it must not object to.
"""

from bench.contract.controls import FLAWS, control, mutate, score
from bench.contract.honest import HONEST
from bench.contract.runner import Difference, Report, examine
from bench.contract.suite import FAMILIES, suite

__all__ = [
    "FAMILIES",
    "FLAWS",
    "HONEST",
    "Difference",
    "Report",
    "control",
    "examine",
    "mutate",
    "score",
    "suite",
]
