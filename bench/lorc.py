"""Loss and bytes of a cache that holds latents of K and V (LoRC), and what a step costs.

The shipped model reads a novel that it never saw. `svd` knows the weights alone, as the paper has
it; `sample` also 4,096 bytes of another novel; `alike` is `sample` with the same rank in every
layer. A figure is the loss in bits a byte; `worse` how much more than the dense loss that is. Bytes
are those mapped for a prompt of 2,048 bytes. A step decodes one byte behind it: K and V of all
tokens are made anew for that.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from bench.harness import Bench
from bench.model_card import SHIPPED, decoded_bits

SHARES, QUICK_SHARES = (0.75, 0.5, 0.25), (0.75, 0.5)
METHODS, QUICK_METHODS = ("svd", "sample", "alike"), ("svd", "sample")
SAMPLE, PROMPT = 4096, 2048  # bytes
TEXT, SHORT = 16 << 10, 4 << 10  # bytes scored
CHECKED, FEW = 192, 48  # bytes decoded one by one through the cache
APART = 1e-3  # bits a byte that rounding may change
WITHIN = "<= 2"  # percent that a sampled cache of half the bytes may lose


def run(bench: Bench) -> None:
    if bench.peer("transformers") is None:
        return bench.skip("transformers is not installed")
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from bench.model.data import held_out, novels

    disable_progress_bar()
    # Small matrices: a second thread costs more than it does.
    torch.set_num_threads(1)
    net = LlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    text, sample = held_out()[: bench.pick(TEXT, SHORT)], novels()[0][:SAMPLE]
    return figures(bench, net, text, ids_of(sample))


def figures(bench: Bench, net: Any, text: bytes, sample: torch.Tensor) -> None:
    """Everything there is to say of one model and text."""
    from bench.model.evaluate import bits_per_byte

    some = text[: bench.pick(CHECKED, FEW)]
    gate = cache(partial(sound, net, some, sample))  # one verdict for all
    whole, dense = bits_per_byte(net, text), mapped(net, text)
    bench.figure("lorc/dense", whole, "bits a byte", gate=gate, mapped_bytes=dense)
    half = 0.0
    for keep in bench.pick(SHARES, QUICK_SHARES):
        for method in bench.pick(METHODS, QUICK_METHODS):
            with compressed(net, keep, method, sample) as latents:
                loss = bits_per_byte(net, text)
                bytes_held = mapped(net, text, latents)
                bench.figure(
                    f"lorc/{method}/{keep:.0%}",
                    loss,
                    "bits a byte",
                    gate=partial(agrees, net, some, latents),
                    worse_percent=100 * (loss / whole - 1),
                    ranks=latents.ranks,
                    share=latents.share,
                    mapped_bytes=bytes_held,
                )
            if (keep, method) == (0.5, "sample"):
                half = loss
                name = "lorc/bytes/50%"
                bench.figure(name, bytes_held, "B", gate=gate, peer="dense", peer_value=dense)
    worse = 100 * (half / whole - 1)
    bench.figure("lorc/worse/50%", worse, "% of the dense loss", gate=gate, target=WITHIN)
    steps(bench, net, text, sample)


def steps(bench: Bench, net: Any, text: bytes, sample: torch.Tensor) -> None:
    """One byte behind a prompt, with latents of half the bytes and with K and V."""
    from vattn.hf import VattnCache

    ids = ids_of(text[: PROMPT + 1])
    with compressed(net, 0.5, "sample", sample) as latents:
        ours, theirs = VattnCache(net.config, latents=latents), VattnCache(net.config)

        @torch.no_grad()
        def step(held: Any) -> None:
            net(ids[:, -1:], past_key_values=held, use_cache=True)
            held.crop(-1)

        with torch.no_grad():
            for each in (ours, theirs):
                net(ids[:, :-1], past_key_values=each, use_cache=True)
        bench.figure(
            "lorc/step/50%",
            lambda: bench.compare(
                partial(step, ours), partial(step, theirs), repeat=bench.pick(20, 8)
            ),
            "ms",
            gate=partial(agrees, net, text[:FEW], latents),
            peer="K and V",
        )


def sound(net: Any, some: bytes, sample: torch.Tensor) -> bool:
    """At full rank the model is the dense one, in one piece and byte by byte through the cache."""
    from bench.model.evaluate import bits_per_byte

    whole = bits_per_byte(net, some)
    for method in METHODS:
        with compressed(net, 1.0, method, sample) as latents:
            full = bits_per_byte(net, some)
            assert abs(full - whole) < APART, f"{method}: {full} bits a byte at full rank"
            agrees(net, some, latents)
    return True


def agrees(net: Any, some: bytes, latents: Any) -> bool:
    """A text that is fed byte by byte through the cache has the loss that it has in one piece."""
    from bench.model.evaluate import bits_per_byte

    whole, stepwise = bits_per_byte(net, some), decoded_bits(net, some, latents=latents)
    assert abs(whole - stepwise) < APART, f"{whole} bits a byte at once, {stepwise} byte by byte"
    return True


def compressed(net: Any, keep: float, method: str, sample: torch.Tensor) -> Any:
    """The model, compressed in one of `METHODS`."""
    from vattn.hf import compress

    seen = None if method == "svd" else sample
    return compress(net, keep, progressive=method != "alike", sample=seen)


@torch.no_grad()
def mapped(net: Any, text: bytes, latents: Any = None) -> int:
    """Bytes of pages behind a prompt."""
    from vattn.hf import VattnCache

    held = VattnCache(net.config, latents=latents)
    net(ids_of(text[:PROMPT]), past_key_values=held, use_cache=True)
    return held.stats().mapped_bytes


def ids_of(text: bytes) -> torch.Tensor:
    """One row of token ids."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
