"""Gradients against autograd of the definition in float64: interpreted, or on a device."""

from __future__ import annotations

import mmap
import signal
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.backwards import HALVES, Call, agree, call, random_call, rows
from tests.guard import outcome
from tests.places import PLACES
from vattn.kernels.backward import backward, backward_sinks
from vattn.kernels.backward_rows import reference, row_terms
from vattn.kernels.backward_tiles import Tile, Tiles, tiles_of
from vattn.kernels.gpu import A100, B200, H100, Device
from vattn.kernels.scores import Scores

NAN, NOTHING = float("nan"), float("-inf")
MAP_NORESERVE = 0x4000  # of Linux: mmap has its name since Python 3.12


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Fresh numbers, and NaN in whatever torch.empty gives."""
    torch.manual_seed(11)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def native(given: Call) -> tuple[Tensor, ...]:
    """torch's own gradients on the same inputs."""
    leaves = [t.detach().requires_grad_() for t in (given.query, given.key, given.value)]
    causal = given.scores.causal == "top_left"
    out = scaled_dot_product_attention(
        *leaves, attn_mask=given.mask, is_causal=causal, enable_gqa=True
    )
    return torch.autograd.grad(out, leaves, given.grad)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", ["full", "causal", "mask"])
def test_no_worse_than_torch(place: str, dtype: torch.dtype, kind: str) -> None:
    """At most four times the error of torch's own kernels, where those are not exact by chance.

    Triton's interpreter cuts numbers off to bfloat16 where a device rounds them: twice the error.
    """
    given = call(dim=64, dtype=dtype, place=place)
    if kind == "causal":
        given = replace(given, scores=Scores(causal="top_left"))
    if kind == "mask":
        given = replace(given, mask=torch.rand(40, 70, device=place) < 0.6)
    times = 8 if dtype == torch.bfloat16 and place == "cpu" else 4
    wanted = given.expected()
    for found, own, right in zip(given.run(), native(given), wanted, strict=True):
        allowed = times * float((own.double() - right).abs().max()) + 1e-6
        torch.testing.assert_close(found.double(), right, rtol=0, atol=allowed)


SCORES = {
    "top_left": Scores(causal="top_left"),
    "bottom_right": Scores(causal="bottom_right"),
    "window": Scores(causal="bottom_right", window=20),
    "window_top_left": Scores(causal="top_left", window=7, scale=0.4),
    "sink_tokens": Scores(causal="bottom_right", window=9, sink_tokens=5),
    "many_sink_tokens": Scores(causal="bottom_right", window=1, sink_tokens=40),
    "softcap": Scores(softcap=0.8),
    "alibi": Scores(alibi=torch.tensor([0.3, 0.05])),
    "alibi_top_left": Scores(alibi=torch.tensor([[0.3, 0.05]]), causal="top_left"),
    "sinks": Scores(sink_logits=torch.tensor([0.5, -1.0])),
    "negative_scale": Scores(scale=-0.7, causal="bottom_right"),
    "zero_scale": Scores(scale=0.0),
    "large_scale": Scores(scale=9.0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SCORES)
def test_scores(place: str, name: str) -> None:
    # Both lengths meet both alignments of each kind, over the names.
    tokens, keys = [(40, 60), (60, 35)][list(SCORES).index(name) // 2 % 2]
    scores = on(place, SCORES[name])
    given = call(tokens=tokens, keys=keys, place=place, scores=scores)
    agree(given.run(), given.expected(), torch.float32)


def on(place: str, scores: Scores) -> Scores:
    """The same scores with their tensors on ``place``."""
    tensors = {"alibi": scores.alibi, "sink_logits": scores.sink_logits}
    moved = {name: t.to(place) for name, t in tensors.items() if t is not None}
    return replace(scores, **moved)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("seed", range(8))
def test_combinations(place: str, seed: int) -> None:
    """A seeded sample of all options at once."""
    given = random_call(Random(seed), place)
    agree(given.run(), given.expected(), given.query.dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["top_left", "window", "softcap", "sinks", "negative_scale"])
def test_slopes(place: str, name: str) -> None:
    """Central differences of the definition, along one random direction of each input."""
    given = call(tokens=10, keys=13, place=place, scores=on(place, SCORES[name]))
    given = replace(given, grad_lse=rows(1, 2, 10, place=place))
    found, step = given.run(), 1e-4

    def loss(moved: Call) -> Tensor:
        out, lse = moved.forward()
        return (out * given.grad).sum() + (lse * given.grad_lse).nan_to_num(0.0, 0.0, 0.0).sum()

    for which, gradient in zip(("query", "key", "value"), found, strict=False):
        start = getattr(given, which).double()
        along = torch.randn_like(start)
        ends = [loss(replace(given, **{which: start + sign * step * along})) for sign in (1, -1)]
        torch.testing.assert_close(
            (gradient * along).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-4
        )


MASKS = [
    *((i, j) for i in (1, 20) for j in (1, 30)),
    *((b, h, i, j) for b in (1, 2) for h in (1, 2) for i in (1, 20) for j in (1, 30)),
]
# Every shape, and every kind with either size of each axis.
KINDS = ("bool", "float32", "query")
MASKED = [(shape, KINDS[i % 3]) for i, shape in enumerate(MASKS)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("shape", "kind"), MASKED, ids=str)
def test_masks(place: str, shape: tuple[int, ...], kind: str) -> None:
    """Every broadcast form; rows that see nothing among them, since a mask may hide a whole row."""
    dtype = torch.float16 if kind == "query" else torch.float32
    given = call(2, 2, 1, 20, 30, place=place, dtype=dtype)
    seen = torch.rand(shape, device=place) < 0.5
    mask = seen if kind == "bool" else rows(*shape, place=place).masked_fill(~seen, NOTHING)
    given = replace(given, mask=mask.half() if kind == "query" else mask)
    agree(given.run(), given.expected(), dtype)


@pytest.mark.parametrize("place", PLACES)
def test_masks_of_any_strides(place: str) -> None:
    """A mask that lies keys first, one expanded by the caller, one cut out of a larger one."""
    given = call(2, 2, 1, 20, 30, place=place)
    whole = rows(2, 2, 60, 50, place=place)
    for mask in (
        whole.mT[:, :, 5:45:2, 3:33],
        whole[:1, :1, :1, :30].expand(2, 2, 20, 30),
        (whole > 0)[:, :, :20, 3:33],
        (whole > 0).mT[:, 1:, 7:8, ::2],
    ):
        given = replace(given, mask=mask)
        agree(given.run(), given.expected(), torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_rows_that_see_nothing(place: str) -> None:
    """Exactly 0, whatever gradient comes in, and no NaN elsewhere."""
    given = call(tokens=50, keys=20, place=place, scores=Scores(causal="bottom_right"))
    given = replace(given, grad_lse=torch.zeros(1, 2, 50, device=place))
    given.grad_lse[:, :, :30] = NAN
    found = given.run()
    agree(found, given.expected(), torch.float32)
    assert (found[0][:, :, :30] == 0.0).all()
    nothing = replace(given, mask=torch.zeros(1, 20, dtype=torch.bool, device=place))
    assert all((gradient == 0.0).all() for gradient in nothing.run())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("place", PLACES)
def test_rows_hidden_by_large_numbers(place: str) -> None:
    """A padding row whose mask holds the least finite number changes nothing and is no NaN."""
    given = call(tokens=20, keys=40, place=place)
    mask = torch.zeros(20, 40, device=place)
    mask[:, 33:] = torch.finfo(torch.float32).min
    mask[:4] = torch.finfo(torch.float32).min
    given.grad[:, :, :4] = 0.0
    given = replace(given, mask=mask)
    agree(given.run(), given.expected(), torch.float32)
    found = replace(given, mask=mask.clamp(min=-1e9)).run()
    agree(found, given.expected(), torch.float32)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dims", [(13, 13), (72, 80), (24, 130), (1, 5), (40, 8)], ids=str)
def test_head_dims(place: str, dims: tuple[int, int]) -> None:
    given = call(1, 1, 1, 20, 40, *dims, place=place)
    agree(given.run(), given.expected(), torch.float32)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 70), (70, 1), (33, 65)])
@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
def test_lengths(place: str, causal, tokens: int, keys: int) -> None:
    given = call(tokens=tokens, keys=keys, place=place, scores=Scores(causal=causal))
    agree(given.run(), given.expected(), torch.float32)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
def test_grouped_heads(place: str, heads: int, kv_heads: int) -> None:
    """dK and dV of a KV head are sums over the query heads that it serves."""
    given = call(1, heads, kv_heads, 20, 40, place=place, scores=Scores(causal="bottom_right"))
    agree(given.run(), given.expected(), torch.float32)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lost", ["batch", "heads", "tokens", "keys"])
def test_empty(place: str, lost: str) -> None:
    sizes = {"batch": 2, "heads": 2, "kv_heads": 2, "tokens": 5, "keys": 7, lost: 0}
    if lost == "heads":
        sizes["kv_heads"] = 1
    given = call(**sizes, dim=16, value_dim=24, place=place)
    sinks = torch.zeros(sizes["heads"], device=place)
    given = replace(given, scores=Scores(sink_logits=sinks))
    shapes = [t.shape for t in (given.query, given.key, given.value)]
    lse = torch.zeros(given.query.shape[:3], device=place)
    tensors = (given.grad, given.query, given.key, given.value, torch.zeros_like(given.grad))
    found = backward_sinks(*tensors, lse, given.scores, grad_lse=torch.ones_like(lse))
    assert [gradient.shape for gradient in found] == [*shapes, sinks.shape]
    assert all((gradient == 0.0).all() for gradient in found[:3])
    # Of no keys the sinks are all that the log-sum-exp is made of.
    assert (found[3] == (10.0 if lost == "keys" else 0.0)).all()


@pytest.mark.parametrize("place", PLACES)
def test_strides(place: str) -> None:
    """Tokens before heads, Q, K and V side by side in one tensor, rows at odd addresses: results
    keep the order. Expanded tensors, which autograd is fond of."""
    given = call(2, 4, 2, 20, 20, place=place)
    wanted = given.expected()
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in given_tensors(given)]
    joined = torch.cat([t.transpose(1, 2) for t in given_tensors(given)[1:]], 2).transpose(1, 2)
    odd = [torch.cat([t[..., :3], t], -1)[..., 3:] for t in given_tensors(given)]
    for tensors in (turned, [turned[0], *joined.split([4, 2, 2], 1)], odd):
        found = Call(*tensors).run()
        agree(found, wanted, torch.float32)
        for gradient, tensor in zip(found, tensors[1:], strict=True):
            assert gradient.stride() == torch.empty_like(tensor).stride()
    one = rows(1, 1, 1, 16, place=place).expand(2, 2, 20, 16)
    wide = Call(torch.ones_like(given.grad[..., :1]).expand_as(given.grad), given.query, one, one)
    agree(wide.run(), wide.expected(), torch.float32)


def given_tensors(given: Call) -> list[Tensor]:
    return [given.grad, given.query, given.key, given.value]


@pytest.mark.parametrize("place", PLACES)
def test_tiles_do_not_matter(place: str) -> None:
    scores = Scores(causal="bottom_right", window=37, sink_tokens=3)
    given = call(tokens=40, keys=70, dim=32, place=place, scores=scores)
    wanted = given.expected()
    for query, key in (
        (Tile(16, 64, 4, 1), Tile(64, 16, 4, 1)),
        (Tile(64, 32, 4, 2), Tile(32, 128, 4, 2)),
    ):
        agree(given.run(Tiles(query, key)), wanted, torch.float32)
    agree(given.run(None), wanted, torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_same_bits_again(place: str) -> None:
    given = call(1, 4, 2, 20, 40, dtype=torch.float16, place=place)
    first = given.run()
    for found, again in zip(first, given.run(), strict=True):
        assert torch.equal(found, again)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_row_terms(place: str, with_lse: bool) -> None:
    grad, out = (rows(2, 3, 70, 24, dtype=torch.float16, place=place) for _ in range(2))
    lse = torch.where(rows(2, 3, 70) > 1.0, NOTHING, rows(2, 3, 70)).to(place)
    # Heads last, as some forward kernels leave them.
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    extra = rows(2, 3, 70, place=place) if with_lse else None
    torch.testing.assert_close(
        row_terms(grad, out, lse, extra).double(),
        reference(grad, out, lse, extra),
        rtol=1e-6,
        atol=1e-5,
    )


def far(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A float16 tensor over memory of which only touched pages exist."""
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 2 * extent, flags), dtype=torch.float16)
    return memory.as_strided(shape, strides)


@pytest.mark.parametrize(
    "strides",
    [(2**33, 2**32, 2**27, 1), (2**31 + 64, 2**30, 16, 1), (40, 20, 2**31 + 40, 1)],
    ids=["rows", "heads", "far rows"],
)
def test_far_offsets(strides: tuple[int, ...]) -> None:
    """Offsets beyond 2**31 elements between rows, heads and sequences."""
    near = call(2, 2, 2, 3 if strides[2] > 2**30 else 17, 3, dtype=torch.float16)
    mask = rows(2, 2, near.query.shape[2], 1, dtype=torch.float16)
    near = replace(near, mask=mask)
    moved = [far(t.shape, strides).copy_(t) for t in (*given_tensors(near), mask)]
    agree(Call(*moved[:4], mask=moved[4]).run(), near.expected(), torch.float16)


def test_nothing_outside_is_touched() -> None:
    """Every tensor ends where a closed page begins, and tiles are larger than the tensors."""
    code, said = outcome("tests.backwards:between_closed_pages")
    assert (code, said.strip()) == (0, "right")
    code, _ = outcome("tests.backwards:a_row_too_many")
    assert code == -signal.SIGSEGV


@pytest.mark.gpu
def test_many_heads() -> None:
    """More than 65,535 of them."""
    given = call(700, 100, 100, 2, 2, place="cuda")
    agree(given.run(None), given.expected(), torch.float32)


@pytest.mark.parametrize("device", [A100, H100, B200, Device(89, 128, 99 << 10)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("plain", [True, False])
def test_tiles_fit(device: Device, dtype: torch.dtype, plain: bool) -> None:
    """What a program holds, and every stage of what it loads, lies in shared memory."""
    for dim in (1, 64, 80, 128, 192, 256):
        query, key = tiles_of(device, dim, dtype, plain)
        wide = 2 * max(16, 1 << (dim - 1).bit_length()) * dtype.itemsize
        assert wide * (query.queries + query.stages * query.keys) <= device.shared_bytes
        assert wide * (key.keys + key.stages * key.queries) <= device.shared_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": rows(2, 2, 4, 17)}, "grad is"),
        ({"out": rows(2, 2, 4, 16).half()}, "out is"),
        ({"out": rows(2, 2, 16, 4).mT}, "last dimension"),
        ({"query": rows(2, 2, 16, 4).mT}, "last dimension"),
        ({"key": rows(2, 2, 16, 6).mT}, "last dimension"),
        ({"lse": rows(2, 2, 5)}, "lse is"),
        ({"lse": rows(2, 2, 4).double()}, "lse is"),
        ({"grad_lse": rows(2, 1, 4)}, "grad_lse is"),
        ({"query": rows(2, 3, 4, 16)}, "no multiple"),
        ({"query": rows(8, 2, 16)}, r"must be \[B, Hq, L, D\]"),
        ({"key": rows(2, 2, 6, 16).to(torch.float8_e5m2)}, "must be the same"),
        ({"mask": torch.zeros(4, 5)}, "broadcast"),
        ({"mask": torch.zeros(6)}, "2-D or 4-D"),
        ({"mask": torch.zeros(4, 6).half()}, "must be bool, float32"),
        ({"scores": Scores(alibi=torch.zeros(3))}, "alibi is"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    arguments = {
        **{name: rows(2, 2, 4, 16) for name in ("grad", "query", "out")},
        **{name: rows(2, 2, 6, 16) for name in ("key", "value")},
        "lse": rows(2, 2, 4),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        backward(**arguments)


def test_no_sinks_no_gradient() -> None:
    tensor, lse = rows(1, 1, 2, 16), rows(1, 1, 2)
    with pytest.raises(ValueError, match="no sink_logits"):
        backward_sinks(tensor, tensor, tensor, tensor, tensor, lse, Scores())
