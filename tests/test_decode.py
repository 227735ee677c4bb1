"""Decoding over K and V of any lengths: exact, in any split, and never a row that is not there."""

from __future__ import annotations

import mmap
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attention import fresh_seed
from tests.decoding import SMALL, Case, assert_close, plain, scaled, scored, spread
from tests.guard import PAGE, allow, fenced, outcome
from tests.places import PLACES
from vattn.kernels.deals import Workspace, workspace_for
from vattn.kernels.decode import decode, decode_lse
from vattn.kernels.gpu import Device, pretend
from vattn.kernels.kv import KV
from vattn.kernels.scores import Scores

SPARSE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE


@pytest.fixture(autouse=True)
def small_device(one_thread: None) -> Iterator[None]:
    """New memory holds NaN, and a launch has few programs."""
    fresh_seed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pretend(SMALL):
        yield
    torch.use_deterministic_algorithms(False)


CASES = {
    "plain": Case(),
    "groups of 3, D and Dv of no power of 2": Case(
        heads=6, tokens=4, dim=24, value_dim=40, scores={"causal": "bottom_right"}
    ),
    "half": Case(heads=8, kv_heads=1, dtype=torch.float16, token_major=True),
    "bfloat16": Case(dtype=torch.bfloat16, tokens=2, scores={"causal": "bottom_right"}),
    "window and sinks": Case(
        lengths=[190, 60, 7],
        starts=[3, 40, 0],
        tokens=2,
        scores={"causal": "bottom_right", "window": 50, "sink_tokens": 5},
    ),
    "window beyond what is left": Case(
        lengths=[150, 9], starts=[145, 9], scores={"causal": "bottom_right", "window": 20}
    ),
    "softcap, slopes, negative scale": Case(
        tokens=3, alibi=True, scores={"causal": "bottom_right", "softcap": 2.0, "scale": -0.7}
    ),
    "sink logits, empty sequence": Case(lengths=[0, 150], sink_logits=True),
    "tree": Case(tokens=5, tree="shared"),
    "a tree each, shorter sequence": Case(
        tokens=5, tree="own", scores={"causal": "bottom_right", "window": 70}, kv_heads=1
    ),
    "top left": Case(tokens=4, scores={"causal": "top_left"}),
    "slots": Case(lengths=[90, 130], slots=[3, 1], starts=[64, 0], token_major=True),
    "two tiles of query rows": Case(
        heads=20, kv_heads=1, tokens=4, dim=16, value_dim=8, scores={"causal": "bottom_right"}
    ),
    "scale 0": Case(scores={"scale": 0.0, "causal": "bottom_right", "window": 30}),
    "negative scale": Case(scores={"scale": -1.3}),
    "negative scale, bfloat16": Case(dtype=torch.bfloat16, scores={"scale": -1.3}),
    "one element a row": Case(dim=1, value_dim=1),
}


# Of which logits are looked at: each kind of score and of tile.
TOLD = ["groups of 3, D and Dv of no power of 2", "window and sinks", "slots"]
TOLD += ["softcap, slopes, negative scale", "a tree each, shorter sequence"]
TOLD += ["two tiles of query rows", "negative scale, bfloat16"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, place: str) -> None:
    case = Case(**{**vars(CASES[name]), "place": place})
    query, kv, scores, tree = case.make()
    one_launch = bool(torch.rand(()) < 0.5)
    print("one launch", one_launch)
    workspace = workspace_for(query, kv, scores, one_launch=one_launch)
    out, lse = decode_lse(query, kv, scores, tree=tree, workspace=workspace)
    assert_close(out, lse, query, kv, scores, tree)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TOLD)
def test_logits_are_what_queries_score(name: str, place: str) -> None:
    """The bits of the result are those without them."""
    case = Case(**{**vars(CASES[name]), "place": place})
    query, kv, scores, tree = case.make()
    lines = (len(query), case.kv_heads, case.heads // case.kv_heads * case.tokens)
    logits = torch.full((*lines, max(case.lengths)), float("nan"), device=place)
    told = decode_lse(query, kv, scores, tree=tree, logits=logits)
    plain = decode_lse(query, kv, scores, tree=tree)
    assert all(torch.equal(some, other) for some, other in zip(told, plain, strict=True))
    exact = scored(query, kv, scores, tree)
    atol = 1e-4 if case.dtype == torch.float32 else 2e-2
    for b, (length, line) in enumerate(zip(case.lengths, exact, strict=True)):
        found = logits[b].cpu().double()
        assert bool((found[..., length:] == -torch.inf).all())
        torch.testing.assert_close(found[..., :length], line, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_one_launch_gives_what_two_give_again_and_again(place: str) -> None:
    query, kv, scores, _ = Case(lengths=[199, 70], place=place).make()
    one = workspace_for(query, kv, one_launch=True)
    two = workspace_for(query, kv, one_launch=False)
    assert (one.arrived is None, two.arrived is None) == (False, True)
    first = decode_lse(query, kv, workspace=one)
    assert int(one.arrived.abs().sum()) == 0
    for workspace in (one, two, None):
        again = decode_lse(query, kv, workspace=workspace)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    kv.lengths.copy_(torch.tensor([120, 30]))
    assert_close(*decode_lse(query, kv, workspace=one), query, kv, scores)


@pytest.mark.parametrize("place", PLACES)
def test_the_number_of_programs_does_not_matter(place: str) -> None:
    query, kv, scores, _ = Case(lengths=[200, 17], heads=2, kv_heads=1, place=place).make()
    for processors in (1, 3, 8):
        with pretend(Device(80, processors, 163 << 10)):
            assert_close(*decode_lse(query, kv), query, kv, scores)


def make_split_case(lengths: list[int], place: str) -> tuple[Tensor, KV]:
    query, kv, _, _ = Case(lengths=lengths, reserved=300, dim=16, value_dim=16, place=place).make()
    return query, kv


@pytest.mark.parametrize("place", PLACES)
def test_fixed_splits_give_the_same_bits_in_any_batch(place: str) -> None:
    query, kv = make_split_case([290, 130, 256, 3], place)
    whole = decode_lse(query, kv, split_tokens=128)
    assert_close(*whole, query, kv, Scores())
    for order in ([2], [3, 0], [1, 0, 2, 0]):
        some = KV(kv.key, kv.value, kv.lengths[order], slots=torch.tensor(order, device=place))
        alone = decode_lse(query[order], some, split_tokens=128)
        assert all(torch.equal(a[order], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_a_sequence_alone_differs_in_its_last_bits_without_fixed_splits(place: str) -> None:
    """What fixed splits are for; were it not so, the test above would show nothing."""
    query, kv = make_split_case([290, 130, 256, 299], place)
    whole = decode(query, kv)
    alone = [
        decode(query[i : i + 1], KV(kv.key[i, None], kv.value[i, None], kv.lengths[i, None]))
        for i in range(3)
    ]
    assert not torch.equal(whole[:3], torch.cat(alone))


@pytest.mark.parametrize("place", PLACES)
def test_the_order_of_keys_does_not_matter(place: str) -> None:
    query, kv, scores, _ = Case(lengths=[140], kv_heads=1, place=place).make()
    order = torch.randperm(140, device=place)
    shuffled = KV(kv.key[:, :, order], kv.value[:, :, order])
    assert_close(*decode_lse(query, shuffled), query, kv, scores)


@pytest.mark.parametrize("place", PLACES)
def test_heads_of_a_group_read_one_kv_head(place: str) -> None:
    query, kv, scores, _ = Case(lengths=[100], heads=3, kv_heads=1, place=place).make()
    repeated = KV(
        kv.key.expand(-1, 3, -1, -1), kv.value.expand(-1, 3, -1, -1), kv.lengths
    )  # strides of 0
    assert_close(*decode_lse(query, repeated), query, kv, scores)


@pytest.mark.parametrize("place", PLACES)
def test_the_result_has_the_strides_of_the_query(place: str) -> None:
    query, kv, scores, _ = Case(tokens=2, value_dim=8, lengths=[30, 2], place=place).make()
    moved = query.transpose(1, 2).contiguous().transpose(1, 2)
    out = decode(moved, kv, scores)
    assert out.transpose(1, 2).is_contiguous()
    given = torch.full((2, 4, 2, 16), float("nan"), device=place)[..., :8]
    assert decode(query, kv, scores, out=given) is given
    assert torch.equal(given, out)


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_float32_result_is_not_rounded(one_launch: bool, place: str) -> None:
    case = Case([190, 0], tokens=2, dtype=torch.float16, sink_logits=True, place=place)
    query, kv, scores, _ = case.make()
    out = torch.full(query.shape, float("nan"), device=place)
    workspace = workspace_for(query, kv, scores, one_launch=one_launch)
    found = decode(query, kv, scores, out=out, workspace=workspace)
    assert torch.equal(found.half(), decode(query, kv, scores, workspace=workspace))


def test_a_workspace_of_other_shapes_is_refused() -> None:
    """Parts would go beyond its end."""
    query, kv, scores, _ = Case(lengths=[199, 70]).make()
    right = workspace_for(query, kv, one_launch=True)
    for name, wrong in [
        ("partials", right.partials[:-1]),
        ("partials", right.partials.double()),
        ("partials", right.partials.to("meta")),
        ("partials", right.partials.mT),
        ("tops", right.tops[:, :, :1]),
        ("arrived", right.arrived[:-1]),
        ("arrived", right.arrived.long()),
    ]:
        with pytest.raises(ValueError, match=rf"workspace\.{name} is torch.*pass workspace_for"):
            decode(query, kv, workspace=replace(right, **{name: wrong}))
    larger = Workspace(*(torch.cat([held, held]) for held in vars(right).values()))
    assert_close(*decode_lse(query, kv, workspace=larger), query, kv, scores)
    with pytest.raises(ValueError, match=r"workspace\.partials is"):
        decode(query, kv, split_tokens=128, workspace=replace(right, partials=right.partials[:1]))


def test_a_workspace_that_was_left_in_the_middle_is_cleared() -> None:
    query, kv, scores, _ = Case(lengths=[199, 70]).make()
    space = workspace_for(query, kv, one_launch=True)
    space.arrived.fill_(1)
    space.clear()
    assert_close(*decode_lse(query, kv, workspace=space), query, kv, scores)
    workspace_for(query, kv, one_launch=False).clear()


@pytest.mark.parametrize("place", PLACES)
def test_a_sink_of_no_weight_and_no_key(place: str) -> None:
    """-inf is no sink: an empty sequence is 0 with -inf then, and not NaN."""
    query, kv, _, _ = Case(lengths=[0, 60], tokens=2, place=place).make()
    sinks = torch.tensor([-float("inf"), 0.5, -float("inf"), 0.0], device=place)
    scores = Scores(sink_logits=sinks)
    assert_close(*decode_lse(query, kv, scores), query, kv, scores)


@pytest.mark.parametrize("form", ["strided", "expanded"])
@pytest.mark.parametrize("place", PLACES)
def test_strides_of_counts_and_scores_do_not_matter(form: str, place: str) -> None:
    query, kv, scores, _ = Case(
        lengths=[90, 130], starts=[64, 3], slots=[2, 0], alibi=True, sink_logits=True, place=place
    ).make()
    kv, scores = scaled(kv, place), replace(scores, alibi=torch.rand(2, 4, device=place))
    spread_kv, spread_scores = spread(kv, form), spread(scores, form)
    wanted = decode_lse(query, plain(spread_kv), plain(spread_scores))
    found = decode_lse(query, spread_kv, spread_scores)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    """Heads and sequences more than 2^31 elements apart, rows 2^24."""
    reserved, row = 40, 1 << 24
    key, value = (
        torch.frombuffer(mmap.mmap(-1, 1 << 40, flags=SPARSE), dtype=torch.float16).as_strided(
            (2, 2, reserved, 16), (1 << 37, 1 << 33, row, 1)
        )
        for _ in range(2)
    )
    for tensor in (key, value):
        tensor.copy_(torch.randn(tensor.shape))
    query = torch.randn(2, 4, 1, 16).half()
    kv = KV(key, value, torch.tensor([40, 33]))
    assert_close(*decode_lse(query, kv), query, kv, Scores())


# ---- nothing is read that is not there ----


def fenced_kv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, KV]:
    """Rows 16 to 48 of 64 are there, to the byte, in the second of three slots."""
    key, value = (fenced((3, 64, 2, 32), dtype).transpose(1, 2) for _ in range(2))
    assert key.stride(2) * 16 * dtype.itemsize == PAGE
    for tensor in (key, value):
        allow(tensor.transpose(1, 2)[1, 16:48]).normal_()
    query = torch.randn(1, 4, 2, 32, dtype=dtype)
    at = [torch.tensor([n]) for n in (48, 16, 1)]
    return query, KV(key, value, *at)


FENCED = [
    Scores(),
    Scores(causal="bottom_right"),
    Scores(causal="bottom_right", window=9),
    Scores(causal="bottom_right", window=9, sink_tokens=20),
    Scores(causal="top_left"),
]


def read_fenced() -> None:
    """Run in a child: every row that is there is needed, and no other."""
    for scores in FENCED:
        query, kv = fenced_kv()
        for split_tokens in (None, 128):
            out, lse = decode_lse(query, kv, scores, split_tokens=split_tokens)
            assert_close(out, lse, query, kv, scores)
    # Between the sinks and the window there need be nothing.
    key, value = (fenced((1, 1, 128, 64), torch.float32) for _ in range(2))
    for tensor in (key, value):
        allow(tensor[0, 0, :16]).normal_()
        allow(tensor[0, 0, 112:128]).normal_()
    scores = Scores(causal="bottom_right", window=16, sink_tokens=16)
    query = torch.randn(1, 2, 1, 64)
    out, lse = decode_lse(query, KV(key, value), scores)
    near = torch.cat([torch.arange(16), torch.arange(112, 128)])
    assert_close(out, lse, query, KV(key[:, :, near], value[:, :, near]), Scores())


def read_a_row_too_many() -> None:
    query, kv = fenced_kv()
    decode(query, KV(kv.key, kv.value, kv.lengths + 1, kv.starts, kv.slots))


def read_a_row_too_early() -> None:
    query, kv = fenced_kv()
    decode(query, KV(kv.key, kv.value, kv.lengths, kv.starts - 1, kv.slots))


def test_no_row_is_touched_that_is_not_there() -> None:
    code, said = outcome("tests.test_decode:read_fenced")
    assert code == 0, said


@pytest.mark.parametrize("stray", ["read_a_row_too_many", "read_a_row_too_early"])
def test_a_stray_read_would_be_seen(stray: str) -> None:
    assert outcome(f"tests.test_decode:{stray}")[0] == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 17}, "17 query tokens: must be at most 16"),
        ({"heads": 3}, "3 query heads are no multiple of 2"),
    ],
)
def test_what_is_refused(change: dict, message: str) -> None:
    query, kv, scores, _ = Case(**change).make()
    with pytest.raises(ValueError, match=message):
        decode(query, kv, scores)


def test_what_else_is_refused() -> None:
    query, kv, scores, _ = Case(tokens=2).make()
    square = torch.ones(2, 2, dtype=torch.bool)
    for options, message in [
        ({"split_tokens": 100}, "split_tokens=100: must be a multiple of 128"),
        ({"tree": torch.ones(2, 3, dtype=torch.bool)}, "tree is torch.bool .2, 3."),
        ({"tree": square.float()}, "tree is torch.float32"),
        ({"out": query.double()}, "out is torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode(query, kv, scores, **options)
    with pytest.raises(ValueError, match="top_left"):
        decode(query, kv, Scores(causal="top_left"), tree=square)
    with pytest.raises(ValueError, match="stride 2 in its last dimension"):
        decode(query.mT.contiguous().mT[:, :, :2], kv)
