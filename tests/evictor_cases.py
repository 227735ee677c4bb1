"""What the tests of eviction policies share: a text, an eviction over it, and the float64 of it.

A call of the engine is told by places in the text, not by rows: which tokens a head held before it
evicted, which after, and what was recorded of them. A reference scores the same tokens in float64,
and `assert_best` says whether what was kept is the best of it. References follow what the engine
kept, so that a tie of float32 fails nothing and a wrong score fails at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vattn.eviction import SCORE, Eviction
from vattn.evictor import Evictor
from vattn.heads import HeadCache
from vattn.kernels.kv import MOST_TOKENS


@dataclass(frozen=True, eq=False)
class Text:
    """Queries [Hq], keys and values [H] of each layer, [B, heads, tokens, D] float32. The first
    ``prompt`` tokens come at once, the others ``fresh`` at a time."""

    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    prompt: int
    fresh: int = 1

    @property
    def layers(self) -> int:
        return len(self.key)

    @property
    def tokens(self) -> int:
        return self.key[0].shape[2]

    def spans(self) -> Iterator[tuple[int, int]]:
        """First and last place of the prompt, and of each step."""
        yield 0, self.prompt
        for start in range(self.prompt, self.tokens, self.fresh):
            yield start, start + self.fresh


def text(
    seed: int,
    *,
    prompt: int = 72,
    steps: int = 22,
    fresh: int = 1,
    layers: int = 2,
    batch: int = 2,
    kv_heads: int = 2,
    groups: int = 2,
    dim: int = 16,
    sharp: float = 2.0,
    lazy: tuple[int, ...] = (),
) -> Text:
    """A random text. ``sharp`` scales scores; the layers of ``lazy`` look at the first token."""
    of = torch.Generator().manual_seed(seed)
    tokens = prompt + steps * fresh

    def draw(heads: int) -> list[Tensor]:
        shape = (batch, heads, tokens, dim)
        return [torch.randn(shape, generator=of) for _ in range(layers)]

    query, key, value = draw(kv_heads * groups), draw(kv_heads), draw(kv_heads)
    for layer in range(layers):
        # Layers differ, and so do heads: what shares a budget must find something to share.
        heads = torch.linspace(0.5, 1.5, kv_heads * groups)[:, None, None]
        query[layer] *= sharp * heads * (1 + layer / layers)
    for layer in lazy:
        query[layer][..., 0] = 4.0
        key[layer][..., 0] = 0.0
        key[layer][:, :, 0, 0] = 16.0
    return Text(query, key, value, prompt, fresh)


@dataclass(eq=False)
class Call:
    """One layer at the prompt or at a step: queries ``start`` to ``stop`` saw the tokens ``before``
    [B, H, T], and ``after`` stayed; ``score`` [B, H, T] is what is recorded of these."""

    layer: int
    start: int
    stop: int
    before: Tensor
    out: Tensor
    after: Tensor = field(default_factory=lambda: torch.empty(0))
    score: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def prompt(self) -> bool:
        """Whether it is one, the first or a further one: all else are steps."""
        return self.start == 0 or self.stop - self.start > MOST_TOKENS

    @property
    def draft(self) -> int:
        """Tokens of a step that may be taken back, held beyond the budget: all but the first."""
        return 0 if self.prompt else self.stop - self.start - 1

    @property
    def age(self) -> Tensor:
        """[T]: tokens since each; negative for those to come."""
        return self.stop - 1 - torch.arange(self.before.shape[2])

    @property
    def since(self) -> Tensor:
        """[T]: `age`, as of the last token that is sure."""
        return self.age - self.draft


@dataclass(eq=False)
class Run:
    """What an eviction did with a text: its calls in order, rows of all layers of sequence 0's head
    0 after each layer of the prompt, and the engine."""

    text: Text
    calls: list[Call]
    peaks: list[int]
    eviction: Eviction


def run(text: Text, evictor: Evictor) -> Run:
    """The whole text through an eviction, on the host, in float32."""
    batch, kv_heads, tokens, dim = text.key[0].shape
    calls: list[Call] = []
    peaks: list[int] = []
    with HeadCache(
        text.layers,
        kv_heads,
        dim,
        tokens,
        batch=batch,
        dtype="float32",
        device="cpu",
        heads_per_range=any_ranges(kv_heads),
    ) as heads:
        eviction = Eviction(heads, evictor)
        for start, stop in text.spans():
            now = []
            for layer in range(text.layers):
                part = slice(start, stop)
                eviction.append(layer, text.key[layer][:, :, part], text.value[layer][:, :, part])
                before = held(heads, layer, tokens)
                out = eviction.attend(text.query[layer][:, :, part].contiguous(), layer)
                now.append(Call(layer, start, stop, before, out))
                if start == 0:
                    peaks.append(sum(int(heads.lengths(i)[0, 0]) for i in range(text.layers)))
            for call in now:  # a later layer may have shrunk an earlier one
                call.after = held(heads, call.layer, tokens)
                call.score = placed(heads, call.layer, tokens)
            calls += now
    return Run(text, calls, peaks, eviction)


def any_ranges(kv_heads: int) -> int:
    """Heads of a range, drawn: what is kept does not depend on them."""
    return kv_heads if float(torch.rand(())) < 0.5 else 1


def held(heads: HeadCache, layer: int, tokens: int) -> Tensor:
    """Which places of the text a layer holds: [B, H, tokens] bool."""
    out = torch.zeros(heads.batch, heads.kv_heads, tokens, dtype=torch.bool)
    positions, counts = heads.positions(layer), heads.lengths(layer)
    for b in range(heads.batch):
        for h in range(heads.kv_heads):
            at = positions[b, h, : counts[b, h]]
            assert len(at.unique()) == len(at), "a token is held twice"
            out[b, h, at] = True
    return out


def placed(heads: HeadCache, layer: int, tokens: int) -> Tensor:
    """The recorded scores by places of the text: [B, H, tokens], 0 for what is not held."""
    out = torch.zeros(heads.batch, heads.kv_heads, tokens)
    positions, scores = heads.positions(layer), heads.track(layer, SCORE)
    for b in range(heads.batch):
        for h, count in enumerate(heads.lengths(layer)[b]):
            out[b, h, positions[b, h, :count]] = scores[b, h, :count]
    return out


def logits(text: Text, call: Call, rows: int | None = None) -> Tensor:
    """The scores of a call's last ``rows`` queries, [B, H, G, r, T] float64: -inf where a query
    sees nothing."""
    first = call.start if rows is None else max(call.start, call.stop - rows)
    key = text.key[call.layer].double()
    query = text.query[call.layer][:, :, first : call.stop].double()
    grouped = query.unflatten(1, (key.shape[1], -1))
    found = torch.einsum("bhgrd,bhtd->bhgrt", grouped, key) * key.shape[-1] ** -0.5
    sees = torch.arange(key.shape[2]) <= torch.arange(first, call.stop)[:, None]
    return found.masked_fill(~(sees & call.before[:, :, None, None]), -torch.inf)


def attention(text: Text, call: Call, rows: int | None = None) -> Tensor:
    """Attention of a call's last ``rows`` queries to all places, [B, H, G, r, T] float64."""
    return logits(text, call, rows).softmax(-1)


def assert_best(
    before: Tensor, after: Tensor, scores: Tensor, forced: Tensor, counts: Tensor, note: str
) -> float:
    """What stayed of ``before`` is the best ``counts`` [...] of it by ``scores`` [..., n], those of
    ``forced`` in any case; as many as there are where there are fewer. Returns by how much the
    closest choice was made."""
    assert bool((after <= before).all()), f"a token came back: {note}"
    assert bool((after.sum(-1) == counts.minimum(before.sum(-1))).all()), f"how many: {note}"
    forced = (forced & before).expand_as(before)
    assert bool((forced <= after).all()), f"a token that stays in any case went: {note}"
    least = scores.masked_fill(~after | forced, torch.inf).amin(-1)
    most = scores.masked_fill(~before | after, -torch.inf).amax(-1)
    slack = 1e-5 * scores.abs().amax(-1).clamp_min(1e-3)
    assert bool((least >= most - slack).all()), f"a better token went: {note}"
    return float((least - most).min())


def assert_recorded(call: Call, scores: Tensor, note: str, *, rtol: float = 1e-4) -> None:
    """What is recorded of the tokens that stayed is ``scores`` [B, H, T]."""
    expected = scores.masked_fill(~call.after, 0.0).float()
    torch.testing.assert_close(call.score, expected, rtol=rtol, atol=1e-5, msg=lambda m: note + m)


def dense(text: Text) -> list[Tensor]:
    """The results of each call over a cache that keeps everything."""
    batch, kv_heads, tokens, dim = text.key[0].shape
    found = []
    with HeadCache(
        text.layers, kv_heads, dim, tokens, batch=batch, dtype="float32", device="cpu"
    ) as heads:
        for start, stop in text.spans():
            for layer in range(text.layers):
                part = slice(start, stop)
                heads.append(layer, text.key[layer][:, :, part], text.value[layer][:, :, part])
                query = text.query[layer][:, :, part].contiguous()
                found.append(heads.attend_lse(query, layer)[0])
    return found
