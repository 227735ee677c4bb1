"""A transformers model whose K and V come from latents, so that a cache can hold those instead.

    compressed = vattn.hf.compress(model, keep=0.5)     k_proj and v_proj become products of two
    cache = vattn.hf.VattnCache(model.config, latents=compressed)
    model.generate(**inputs, past_key_values=cache)     with any attention
    compressed.restore()                                the model as it was

`k_proj` and `v_proj` of every layer are replaced by `vattn.lorc.LowRank`; see there for the method.
The layer of the cache finds the latents of the new tokens there, and the positions at the model's
own rotary embedding; it rebuilds K and V of all tokens at every step with the attention's own
norm and the model's own rotation. Before anything is changed, a few tokens show whether that gives
the K and V that the model makes: what works differently is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from vattn.hf_attention import UnsupportedError
from vattn.hf_versions import kinds_of
from vattn.lorc import TAPER, Factors, LorcError, LowRank, factors, ranks, weights

# Rotations whose angles depend on the position alone. The others change them with the length: a
# token rotated anew would not come out as it was.
ROPES = ("default", "linear", "llama3", "yarn", "proportional")
REHEARSED = 4  # tokens of each row
WITHOUT = "use vattn.hf.VattnCache(model.config) without latents for this model"


@dataclass(frozen=True)
class Site:
    """The projections of one layer: what they are now, and what they were."""

    attention: nn.Module
    key: LowRank
    value: LowRank
    before: tuple[nn.Linear, nn.Linear]


class Compressed:
    """A compressed model. `restore` undoes it, and so does leaving a ``with`` block.

    ``ranks``: latent numbers of a token, of K and of V each, by layer. ``widths``: what K has
    without compression. ``share``: bytes of the cache, of those of a whole one.
    """

    def __init__(self, sites: list[Site], rotary: nn.Module) -> None:
        self.sites, self.rotary = sites, rotary
        self.ranks = tuple(len(site.key.down) for site in sites)
        self.widths = tuple(len(site.key.up) for site in sites)
        self.active = False
        self._positions: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def share(self) -> float:
        """Numbers held of a token, of those that K and V have."""
        return sum(self.ranks) / sum(self.widths)

    def restore(self) -> None:
        """Give the model its own projections back, where the model is now, in the type it has now.
        Caches of latents cannot go on then."""
        self.active, self._positions = False, None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for site in self.sites:
            # What stands there is not ours where the model was restored and compressed anew.
            if site.attention.k_proj is site.key:
                site.attention.k_proj = site.before[0].to(site.key.up)
            if site.attention.v_proj is site.value:
                site.attention.v_proj = site.before[1].to(site.value.up)

    def __enter__(self) -> Compressed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "" if self.active else ", restored"
        return f"<Compressed to {self.share:.1%}, ranks {list(self.ranks)}{state}>"

    # ---- what the layers of a cache ask for ----------------------------------------------------
    def take(self, layer: int, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of K and of V [batch, tokens, rank] and positions [batch, tokens] of the tokens
        that this layer has just projected.

        Raises:
            UnsupportedError: it has projected none: another model runs, or this one was restored.
        """
        site = self.sites[layer]
        key, value, positions = site.key.latent, site.value.latent, self._positions
        forget(site.attention)
        shown = [None if x is None else tuple(x.shape[:2]) for x in (key, value)]
        fits = positions is not None and positions.shape in ((batch, tokens), (1, tokens))
        if shown != [(batch, tokens)] * 2 or not fits or key is None or value is None:
            state = "is at work" if self.active else "was restored"
            raise UnsupportedError(
                f"layer {layer} got {tokens} tokens of a batch of {batch}, of which the compressed "
                f"model, which {state}, left no latents: run the model that was compressed, with "
                "position_ids [batch, tokens] if any; or make the cache without latents"
            )
        assert positions is not None
        return key, value, positions.expand(batch, tokens)

    @torch.no_grad()
    def rebuilt(
        self, layer: int, key: Tensor, value: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """K and V [batch, kv_heads, n, head_dim] of latents [batch, n, rank] at positions
        [batch, n]."""
        site = self.sites[layer]
        flat = site.key.rebuilt(key), site.value.rebuilt(value)
        return shaped(site.attention, self.rotary, *flat, positions)

    def install(self) -> None:
        """Put the products in place of the projections: all or none."""
        try:
            self._hooks.append(watched(self.rotary, self._note))
            for site in self.sites:
                hook = site.attention.register_forward_hook(_clear, always_call=True)
                self._hooks.append(hook)
                site.attention.k_proj, site.attention.v_proj = site.key, site.value
        except BaseException:
            self.restore()
            raise
        self.active = True

    def _note(self, positions: Tensor) -> None:
        self._positions = positions


@torch.inference_mode(False)
def compress(
    model: nn.Module, keep: float = 0.5, *, progressive: bool = True, sample: Tensor | None = None
) -> Compressed:
    """Replace the K and V projections of every layer by products of a lower rank (LoRC).

    Args:
        model: of transformers, with full attention in every layer.
        keep: share of the cache's bytes, over 0, at most 1. 1 changes nothing but rounding.
        progressive: shallow layers keep more, by the cumulative condition number; the deepest about
            half of the first (`lorc.TAPER`). False: all alike.
        sample: token ids [rows, tokens] without padding, of what the model will read (a thousand
            are good, a prompt does): the latents are those that lose least of its K and V. None:
            the plain SVD, which knows the weights alone.

    The replaced weights stay in memory for `restore`. Rebuilding costs rank * width multiplications
    of K and of V for each token held, at every step and layer; what is rebuilt lives as long as the
    attention of a layer.

    Raises:
        UnsupportedError: a model whose K and V this does not rebuild; nothing has changed.
        LorcError: no such share, or a sample that is none; nothing has changed.
    """
    attentions, rotary = _attentions(model), _rotary(model)
    _rehearse(model, attentions, rotary)
    projections = [(attention.k_proj, attention.v_proj) for attention in attentions]
    widths = [key.out_features for key, _ in projections]
    limits = [min(key.in_features, key.out_features) for key, _ in projections]
    ranks(widths, limits, [1.0] * len(widths), keep)  # before the work: is there such a share
    moments = {} if sample is None else _moments(model, projections, sample)
    split = [
        (factors(key.weight, moments.get(key)), factors(value.weight, moments.get(value)))
        for key, value in projections
    ]
    conditions = [key.log_condition() + value.log_condition() for key, value in split]
    share = weights(conditions, TAPER if progressive else 1.0)
    sites = [
        Site(attention, _cut(key, rank, before[0]), _cut(value, rank, before[1]), before)
        for attention, before, (key, value), rank in zip(
            attentions, projections, split, ranks(widths, limits, share, keep), strict=True
        )
    ]
    compressed = Compressed(sites, rotary)
    compressed.install()
    return compressed


def shaped(
    attention: nn.Module, rotary: nn.Module, key: Tensor, value: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """What an attention makes of projected K and V [batch, n, width] at positions [batch, n]:
    [batch, kv_heads, n, head_dim], normed and rotated."""
    split = (-1, attention.head_dim)
    key, value = key.unflatten(-1, split), value.unflatten(-1, split)
    norm = getattr(attention, "k_norm", None)
    key = (key if norm is None else norm(key)).transpose(1, 2)
    # Not called as a module: the hook there is for the model's own call.
    cos, sin = rotary.forward(key, positions)
    rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
    # It rotates queries, too: none here.
    return rotate(key[:, :0], key, cos, sin)[1], value.transpose(1, 2)


def watched(rotary: nn.Module, note: Callable[[Tensor], None]) -> RemovableHandle:
    """Pass on the positions that a rotary embedding is called with, until the hook is removed."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    return rotary.register_forward_pre_hook(hook, with_kwargs=True)


def forget(attention: nn.Module) -> None:
    """No latents are left behind: they are as large as a prompt."""
    for projection in (attention.k_proj, attention.v_proj):
        if isinstance(projection, LowRank):
            projection.latent = None


def _clear(attention: nn.Module, args: Any, output: Any) -> None:
    forget(attention)


def _cut(whole: Factors, rank: int, before: nn.Linear) -> LowRank:
    return LowRank(*whole.cut(rank), before.bias).to(before.weight.device)


@torch.no_grad()
def _moments(
    model: Any, projections: list[tuple[nn.Linear, nn.Linear]], sample: Tensor
) -> dict[nn.Module, Tensor]:
    """The mean of y y^T of each projection, [out, out] in float64, y without its bias."""
    integers = sample.dtype in (torch.int64, torch.int32)
    known = model.get_input_embeddings().num_embeddings
    if sample.dim() != 2 or not sample.numel() or not integers or not _within(sample, known):
        raise LorcError(
            f"sample must be token ids [rows, tokens] from 0 to {known - 1}, got "
            f"{tuple(sample.shape)} of {sample.dtype}: pass input_ids, or leave it out"
        )
    sums: dict[nn.Module, Tensor] = {}

    def add(module: Any, args: Any, output: Tensor) -> None:
        y = output if module.bias is None else output - module.bias
        y = y.flatten(0, 1).double()
        sums[module] = sums.get(module, 0.0) + y.T @ y / sample.numel()

    hooks = [p.register_forward_hook(add) for pair in projections for p in pair]
    try:
        for row in sample:  # one at a time: the sample may be large
            model.base_model(input_ids=row[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _within(ids: Tensor, known: int) -> bool:
    return int(ids.min()) >= 0 and int(ids.max()) < known


# ---- what can be compressed ----------------------------------------------------------------------
def _attentions(model: nn.Module) -> list[Any]:
    """The attention of each layer, in order.

    Raises:
        UnsupportedError: not every layer is one of full attention with plain projections.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{name} is no decoder of transformers: latents need one; {WITHOUT}")
    kinds = [kind for kind, _ in kinds_of(config)]
    other = [(i, kind) for i, kind in enumerate(kinds) if kind != "full_attention"]
    if other:
        raise UnsupportedError(
            f"layer {other[0][0]} of {name} is of type {other[0][1]!r}, and latents are held by "
            f"full-attention layers alone; {WITHOUT}"
        )
    found: dict[int, Any] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and (hasattr(module, "o_proj") or hasattr(module, "k_proj")):
            if layer in found:
                raise UnsupportedError(f"layer {layer} of {name} has two attentions; {WITHOUT}")
            found[layer] = module
    if sorted(found) != list(range(len(kinds))):
        raise UnsupportedError(
            f"{name} has {len(kinds)} layers, and attentions with k_proj or o_proj in the layers "
            f"{sorted(found)}; {WITHOUT}"
        )
    for layer, attention in sorted(found.items()):
        for each in ("k_proj", "v_proj"):
            _check_projection(f"layer {layer} of {name}", each, getattr(attention, each, None))
        if attention.k_proj.out_features != attention.v_proj.out_features:
            raise UnsupportedError(f"layer {layer} of {name}: K and V differ in size; {WITHOUT}")
    return [found[layer] for layer in sorted(found)]


def _check_projection(where: str, name: str, projection: Any) -> None:
    if projection is None:
        raise UnsupportedError(
            f"{where} has no {name} (fused projections, or multi-head latent attention); {WITHOUT}"
        )
    if isinstance(projection, LowRank):
        raise UnsupportedError(f"{where} is compressed already: restore() that first")
    if type(projection) is not nn.Linear or projection.weight.is_meta:
        raise UnsupportedError(
            f"{where}: {name} is a {type(projection).__name__} on {projection.weight.device}, not "
            "a plain nn.Linear with its weights in memory (quantised, adapted or offloaded): load "
            f"the model plainly, or merge its adapters, first; or {WITHOUT}"
        )


def _rotary(model: nn.Module) -> nn.Module:
    """The rotary embedding that all layers share.

    Raises:
        UnsupportedError: there is none, or several, or one that depends on the length.
    """
    name = type(model).__name__
    named = model.named_modules()
    found = [module for path, module in named if path.rpartition(".")[2] == "rotary_emb"]
    if len(found) != 1:
        raise UnsupportedError(
            f"{name} has {len(found)} modules named rotary_emb, and latents need the one that "
            f"rotates every K; {WITHOUT}"
        )
    kind = getattr(found[0], "rope_type", None)
    if kind not in ROPES:
        raise UnsupportedError(
            f"{name} rotates by rope_type {kind!r}; a rebuilt K comes out as it was with "
            f"{', '.join(ROPES)}; {WITHOUT}"
        )
    return found[0]


@torch.no_grad()
def _rehearse(model: nn.Module, attentions: list[Any], rotary: nn.Module) -> None:
    """Let the model read a few tokens, and make its K and V from what its projections gave.

    Raises:
        UnsupportedError: they are not those in a cache: the model does something else to them.
    """
    name, seen = type(model).__name__, list[Tensor]()
    flat: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        flat[module] = output

    hooks = [watched(rotary, seen.append)]
    hooks += [p.register_forward_hook(keep) for a in attentions for p in (a.k_proj, a.v_proj)]
    cache: Any = DynamicCache(config=model.config)
    ids = torch.arange(REHEARSED, device=attentions[0].k_proj.weight.device).expand(2, -1)
    # The second row is somewhere else: positions that went unnoticed are noticed.
    positions = ids + torch.tensor([[0], [5]], device=ids.device)
    try:
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        for layer, attention in enumerate(attentions):
            projected = flat[attention.k_proj], flat[attention.v_proj]
            made = shaped(attention, rotary, *projected, seen[-1].expand(2, -1))
            held = cache.layers[layer].keys, cache.layers[layer].values
            if not all(_same(*pair) for pair in zip(made, held, strict=True)):
                raise UnsupportedError(
                    f"layer {layer} of {name} does more to K or V than k_norm and rotation: they "
                    f"cannot be rebuilt from latents; {WITHOUT}"
                )
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{name} did not show its K and V on {REHEARSED} tokens "
            f"({type(error).__name__}: {error}); {WITHOUT}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _same(made: Tensor, held: Tensor) -> bool:
    """Equal but for rounding."""
    if made.shape != held.shape:
        return False
    apart = (made.double() - held.double()).norm() / held.double().norm().clamp_min(1e-30)
    return bool(apart <= max(1e-5, 4 * torch.finfo(held.dtype).eps))
