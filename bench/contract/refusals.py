"""Calls that torch refuses: the class of the error and what its message is about must agree.

A refusal is a wrong way to make one of the forms' calls. It becomes a probe where the torch that is
installed refuses it. Two refusals are the contract's own, and torch is not asked: K and V of
different lengths (its CPU kernel reads past the shorter one), and a mask together with is_causal
(refused on some of its paths, both applied on the others).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.contract.call import Attend, Call, torchs
from bench.contract.cases import Case, Probe
from bench.contract.forms import SMALL, form_case, long
from bench.contract.judge import Differs

FAMILY = "refusals"
SIZES = r"size|shape|broadcast|dimension|match"
MASK_DTYPE = r"Expected attn_mask dtype to be bool or float or to match query dtype"
SAME_DTYPE = r"Expected query, key, and value to have the same dtype"
RANK = r"Expected query, key, and value to all be +at least 2 dimensional"
DIVIDE = r"Number of heads in key and value must divide the number of heads in"


@dataclass(frozen=True)
class Refusal:
    """A wrong way to call an implementation, and what the message must speak of."""

    name: str
    about: str
    attempt: Callable[[Attend, Call], object]
    own: bool = False  # the contract's own rule: RuntimeError, without asking torch


def wrong(name: str, about: str, change: Callable[[Call], Call], *, own: bool = False) -> Refusal:
    return Refusal(name, about, lambda attend, call: change(call).run(attend), own)


def arguments(**changes: Any) -> Callable[[Call], Call]:
    return lambda call: replace(call, **changes)


def each(change: Callable[[Tensor], Any], *names: str) -> Callable[[Call], Call]:
    return lambda call: replace(call, **{name: change(getattr(call, name)) for name in names})


def cast(dtype: torch.dtype) -> Callable[[Call], Call]:
    return each(lambda t: t.to(dtype), *QKV)


def more(name: str, dim: int) -> Callable[[Call], Call]:
    """One entry more in a dimension of some arguments."""

    def grow(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)

    return each(grow, *name.split())


def shorter(name: str) -> Callable[[Call], Call]:
    """One row less; the memory behind the view is there, in case somebody reads it."""
    return each(lambda t: t.narrow(-2, 0, t.shape[-2] - 1), name)


def mask_of(*shape: int | str, dtype: torch.dtype = torch.bool) -> Callable[[Call], Call]:
    """A mask of ones of another shape, with L and S for the call's own lengths."""

    def change(call: Call) -> Call:
        known = {"L": call.query.shape[-2], "S": call.key.shape[-2]}
        sizes = [known[size] if isinstance(size, str) else size for size in shape]
        return replace(call, mask=torch.ones(sizes, dtype=dtype), causal=False)

    return change


def both(call: Call) -> Call:
    mask = torch.ones(call.query.shape[-2], call.key.shape[-2], dtype=torch.bool)
    return replace(call, mask=mask, causal=True)


def heads_of(query: int, key: int, value: int) -> Callable[[Call], Call]:
    def change(call: Call) -> Call:
        made = {
            name: getattr(call, name).select(-3, 0).unsqueeze(-3).repeat_interleave(count, -3)
            for name, count in (("query", query), ("key", key), ("value", value))
        }
        return replace(call, **made, mask=None, gqa=True)

    return change


def two_dimensional(call: Call) -> Call:
    flat = call.map(lambda t: t[(0,) * (t.dim() - 2)])
    return replace(flat, mask=None, gqa=True)


ARITY: dict[str, tuple[str, Callable[[Attend, Call], object]]] = {
    "seven_positional": (
        "positional argument",
        lambda attend, call: attend(call.query, call.key, call.value, None, 0.0, False, None),
    ),
    "no_value": ("missing.*value", lambda attend, call: attend(call.query, call.key)),
    "unknown_keyword": (
        "unexpected keyword argument 'softcap'",
        lambda attend, call: attend(call.query, call.key, call.value, softcap=1.0),
    ),
    "query_twice": (
        "multiple values for argument 'query'",
        lambda attend, call: attend(call.query, call.key, call.value, query=call.query),
    ),
}
QKV = ("query", "key", "value")
REFUSALS = (
    *(wrong(f"{n}_1d", RANK, each(lambda t: t[(0,) * (t.dim() - 1)], n)) for n in QKV),
    *(wrong(f"{n}_0d", RANK, each(lambda t: t[(0,) * t.dim()], n)) for n in QKV),
    *(wrong(f"{n}_dtype", SAME_DTYPE, each(lambda t: t.half(), n)) for n in QKV),
    *(wrong(f"{n}_double", SAME_DTYPE, each(lambda t: t.double(), n)) for n in QKV),
    *(wrong(f"{n}_device", "device", each(lambda t: t.to("meta"), n)) for n in QKV),
    *(wrong(f"{n}_width", SIZES, more(n, -1)) for n in ("query", "key")),
    wrong("kv_heads", SIZES, more("key value", -3)),
    wrong("batch", SIZES, more("key value", 0)),
    wrong("value_batch", SIZES, more("value", 0)),
    *(
        wrong(f"all_{dtype}".replace("torch.", ""), "", cast(dtype))
        for dtype in (torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    *(
        wrong(f"mask_{dtype}".replace("torch.", ""), MASK_DTYPE, mask_of("L", "S", dtype=dtype))
        for dtype in (torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    ),
    wrong("mask_0d", "[Dd]imension", mask_of()),
    wrong("mask_1d", "[Dd]imension", mask_of("S")),
    wrong("mask_one", "[Dd]imension", mask_of(1)),
    wrong("mask_rows", SIZES, mask_of(11, "S")),
    wrong("mask_keys", SIZES, mask_of("L", 11)),
    wrong("mask_heads", SIZES, mask_of(3, "L", "S")),
    wrong("mask_batch", SIZES, mask_of(3, 1, "L", "S")),
    wrong("mask_rank", SIZES, mask_of(1, 1, 1, "L", "S")),
    wrong("mask_none_of_it", SIZES, mask_of(11, 13)),
    wrong("mask_type", "attn_mask.*must be Tensor", arguments(mask=[[True]], causal=False)),
    wrong(
        "mask_array",
        "attn_mask.*must be Tensor",
        arguments(mask=np.ones((1, 1), bool), causal=False),
    ),
    *(
        wrong(f"causal_{name}", "is_causal.*must be bool", arguments(causal=value))
        for name, value in (("int", 1), ("zero", 0), ("none", None), ("tensor", torch.tensor(True)))
    ),
    *(
        wrong(f"gqa_{name}", "enable_gqa.*must be bool", arguments(gqa=value))
        for name, value in (("int", 1), ("none", None))
    ),
    wrong("dropout_high", r"dropout probability has to be between 0 and 1", arguments(dropout=1.5)),
    wrong("dropout_low", "dropout", arguments(dropout=-0.1)),
    wrong("dropout_none", "dropout_p.*must be float", arguments(dropout=None)),
    wrong("dropout_text", "dropout_p.*must be float", arguments(dropout="0.1")),
    *(
        wrong(f"scale_{name}", "scale.*must be float", arguments(scale=value))
        for name, value in (
            ("text", "1"),
            ("list", [1.0]),
            ("pair", torch.ones(2)),
            ("complex", 1j),
        )
    ),
    *(wrong(f"{n}_none", f"{n}.*must be Tensor", arguments(**{n: None})) for n in QKV),
    *(wrong(f"{n}_list", f"{n}.*must be Tensor", arguments(**{n: [1.0]})) for n in QKV),
    wrong("gqa_remainder", DIVIDE, heads_of(3, 2, 2)),
    wrong("gqa_fewer", DIVIDE, heads_of(2, 4, 4)),
    wrong("gqa_value", DIVIDE, heads_of(6, 2, 4)),
    wrong("gqa_2d", "[Dd]imension", two_dimensional),
    wrong("key_shorter", "length|size|rows|tokens|shape", shorter("key"), own=True),
    wrong("value_shorter", "length|size|rows|tokens|shape", shorter("value"), own=True),
    wrong("mask_and_causal", "attn_mask.*is_causal|is_causal.*attn_mask", both, own=True),
    *(Refusal(name, about, attempt) for name, (about, attempt) in ARITY.items()),
)


def refusals(seed: int) -> Iterator[Probe]:
    """A probe for every refusal on every form that the installed torch refuses it on."""
    for case in (form_case(form, FAMILY, seed, torch.float32) for form in (*SMALL, long)):
        for refusal in REFUSALS:
            error = RuntimeError("") if refusal.own else refused_by_torch(refusal, case.call)
            if error is not None:
                run = partial(refuses, refusal=refusal, case=case, error=error)
                yield Probe(FAMILY, refusal.name, case.name, run)


def refused_by_torch(refusal: Refusal, call: Call) -> Exception | None:
    try:
        refusal.attempt(torchs, call)
    except Exception as error:  # whatever torch raises is the rule
        return error.with_traceback(None)
    return None


def refuses(attend: Attend, *, refusal: Refusal, case: Case, error: Exception) -> None:
    """Raise torch's class (or one derived from it), with torch's text or about the same thing."""
    try:
        refusal.attempt(attend, case.call)
    except Exception as found:
        if not isinstance(found, type(error)):
            text = f"{type(found).__name__}: {found}"
            raise Differs(f"raised {text}, torch {type(error).__name__}: {error}") from None
        if worded(found) != worded(error) and not re.search(refusal.about, str(found)):
            raise Differs(f"says {str(found)!r}, torch {str(error)!r}") from None
    else:
        raise Differs(f"accepted what must raise {type(error).__name__}: {error}")


def worded(error: Exception) -> str:
    """A message without its numbers."""
    return re.sub(r"\d+", "#", str(error))
