"""Estimated: the best tokens exactly, and all others by what the index knows of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from vattn.kernels import choose
from vattn.kernels.contract import EMPTY
from vattn.kernels.index import Index, Part
from vattn.kernels.selection import Selection
from vattn.policies.coded import Coded
from vattn.policies.evidence import gathered, records
from vattn.policies.members import tokens_chosen
from vattn.policies.nibbles import Nibbles
from vattn.selector import Caps, Look, Selector


@dataclass(frozen=True, kw_only=True)
class Estimated(Selector):
    """Read the best tokens by ``code``; the others count with the mass that their codes give them
    and the mean of V over their page. For questions that need the mass of many tokens, as counting
    words does: reading few of them loses it.

    The estimation zone of RetroInfer (arXiv 2505.02922), with pages in the place of clusters and
    codes of tokens in the place of centroids: 1 to 4 bytes a token more than ``code`` alone.

    Args:
        budget_tokens: tokens that are read, those of the page that is still growing among them.
        page_tokens: of a mean of V.
        code: of single tokens; its budget does not matter.
    """

    page_tokens: int = 64
    code: Coded = field(default_factory=Nibbles)

    caps: ClassVar[Caps] = Caps(frozenset({"keys", "values", "query", "offline"}), "token")

    def parts(self, head_dim: int) -> tuple[Part, ...]:
        codes = (Part(p.width * self.page_tokens, p.dtype) for p in self.code.parts(head_dim))
        return *codes, Part(head_dim, torch.bfloat16)  # V may be larger than a float16

    def summarise(self, layer: int, keys: Tensor) -> tuple[Tensor, ...]:
        codes = self.code.summarise(layer, keys.flatten(1, 2)[:, :, None])
        return tuple(part.unflatten(1, keys.shape[1:3]).flatten(2) for part in codes)

    def summarise_values(self, layer: int, values: Tensor) -> tuple[Tensor, ...]:
        return (values.float().mean(2).bfloat16(),)

    def forced_pages(self, query_tokens: int) -> tuple[int, int]:
        first, last = super().forced_pages(query_tokens)
        return max(1, first), last  # padding ends within the first one: its mean is not V's alone

    def select(self, query: Tensor, look: Look) -> Selection | None:
        if self.reads_all(look):
            return None
        tokens, length = int(look.lengths.max()), query.shape[2]
        index, means = self._index(look, query.shape[3])
        assert index.counts is not None
        coded = index.counts[:, None]  # [B, 1]: those behind have no code, and are read
        scores = self.code.scores(query, replace(look, index=index), tokens)
        at = torch.arange(tokens, device=query.device)
        start, end = look.firsts(1), look.counts(1)[:, None]
        start = torch.zeros_like(end) if start is None else start[:, None]
        unread = (at >= coded) | (at < start)
        scores.masked_fill_(unread[:, None, None], EMPTY)
        recent = end - (self.recent_tokens + length - 1)
        mixed = -(-start // self.page_tokens) * self.page_tokens
        forced = (at < mixed) | (at < start + self.sink_tokens) | (at >= recent) | (at >= coded)
        joined = self.joined(scores).masked_fill(forced[:, None], choose.FORCED)
        joined.masked_fill_(((at < start) | (at >= end))[:, None], EMPTY)
        ids, count = choose.top_k(joined, self.budget_tokens)
        chosen = Selection(ids, count, 1)
        return replace(chosen, tail=self._rest(scores, chosen, look, means, query))

    def _rest(
        self, scores: Tensor, chosen: Selection, look: Look, means: list[Tensor], query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean of V over the mass of what is not read, [B, Hq, L, Dv], and that mass' log."""
        taken = tokens_chosen(chosen, look, scores.shape[-1], scores.shape[1])[:, :, None]
        left = scores.masked_fill_(taken, EMPTY)
        mass = left.logsumexp(-1)
        shares = (left - mass.masked_fill(mass == EMPTY, 0.0)[..., None]).exp_()
        rest = -shares.shape[-1] % self.page_tokens
        pages = torch.nn.functional.pad(shares, (0, rest))
        pages = pages.unflatten(-1, (-1, self.page_tokens)).sum(-1)
        outs = [some[..., : mean.shape[1]] @ mean for some, mean in zip(pages, means, strict=True)]
        shape = query.shape[:3]
        return torch.stack(outs).reshape(*shape, -1), mass.reshape(shape)

    def _index(self, look: Look, head_dim: int) -> tuple[Index, list[Tensor]]:
        """Codes as one record a token, and the means [Hkv, pages, Dv] of each sequence."""
        whole, size = records(look), self.page_tokens
        counts = whole.counts
        if counts is None:
            counts = torch.full((whole.batch,), whole.parts[0].shape[2], device=look.kv.key.device)
        slots = range(whole.batch) if whole.slots is None else whole.slots.tolist()
        held = list(zip(slots, counts.tolist(), strict=True))
        parts, means = whole.parts[:-1], whole.parts[-1]
        near = [means[slot, :, :count].float() for slot, count in held]
        if all(part.stride(2) == part.shape[3] for part in parts):
            lying = tuple(_tokens(part, size) for part in parts)
            return Index(lying, counts.long() * size, whole.slots), near
        # Heads lie side by side, as on a device: the codes are copied.
        pages = torch.arange(int(counts.max()), device=means.device)
        ids = pages.expand(whole.batch, means.shape[1], -1)
        copied = gathered(Index(parts, counts, whole.slots), ids, size)
        return Index(copied.parts, counts.long() * size), near


def _tokens(part: Tensor, size: int) -> Tensor:
    """Records of pages [N, Hkv, P, size * w], one behind the other, as those of tokens [N, Hkv,
    P * size, w], where they lie."""
    batch, heads, pages, width = part.shape
    strides = (part.stride(0), part.stride(1), width // size, 1)
    shape = (batch, heads, pages * size, width // size)
    return part.as_strided(shape, strides, part.storage_offset())
