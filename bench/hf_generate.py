"""Decoding with transformers: time a token and memory, beside DynamicCache and StaticCache.

An 8B-shaped attention (32 query heads, 8 KV heads of 128) under a tiny model of few layers, so that
the cache is what costs. All three caches hold the same random rows, filled directly instead of by a
prefill; then the model decodes greedily, one step of each cache in turn, with the same attention
function, on one thread. StaticCache is made exactly as long as needed, which no user could do: a
longer one reads more. A larger model shrinks every ratio, because weights are read for all alike.

`memory` is bytes held for each byte of live rows: for ours the resident bytes of its pages, for
DynamicCache its tensors and the one that `torch.cat` makes beside its predecessor (K of one layer:
1 / (2 layers) of it all), for StaticCache its tensors when made for the longest context of the run.
`rss` is the peak of a process that fills and decodes, less what it held before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.harness import Bench, Sample

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = (1024, 8192, 32768)
QUICK = {"fp32": 8192, "bf16": 1024}  # longest context under --quick
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
VOCAB = 256
SHARP = 3.0  # times the stock initialisation, which would hide faults
ROW_SCALE = 4.0  # of the random rows: attention looks at some 20 of them, not at all alike
GREEDY_STEPS = 6
CHUNK = 512
SPARE = 256  # steps that StaticCache has room for
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
TARGETS = {"DynamicCache": "ratio >= 3.5", "StaticCache": "ratio >= 1.0"}
KINDS = ("vattn", *TARGETS)
MEMORY_TARGET = "<= 1.05"
PEAK = "from bench.hf_generate import peak; peak({kind!r}, {context}, {dtype!r}, {layers}, {seed})"


def run(
    bench: Bench,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    context: Annotated[list[int], typer.Option(help="Tokens in the cache.")] = list(CONTEXTS),
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    if bench.peer("transformers") is None:
        return bench.skip("transformers is not installed")
    torch.set_num_threads(threads)
    for dtype in DTYPES:
        for tokens in context:
            if tokens <= bench.pick(1 << 30, QUICK[dtype]):
                one_context(bench, layers, tokens, dtype, max(context))
    if not bench.quick:
        rss(bench, layers, max(context))
    return None


def one_context(bench: Bench, layers: int, tokens: int, dtype: str, longest: int) -> None:
    """Time and memory at one length."""
    contest = Contest(bench, layers, tokens, dtype)
    name = f"hf_generate/{dtype}/{tokens // 1024}k"
    for rival, target in TARGETS.items():
        bench.figure(
            f"{name}/beside_{rival}",
            partial(contest.versus, rival),
            "ms",
            gate=partial(contest.agree, GREEDY_STEPS),
            target=target if tokens == CONTEXTS[-1] else None,
            peer=rival,
            layers=layers,
            threads=torch.get_num_threads(),
        )
    usage = contest.caches["vattn"].stats()
    for rival, ratio in contest.held(longest).items():
        bench.figure(
            f"{name}/memory/beside_{rival}",
            usage.resident_bytes / usage.used_bytes,
            "held/used",
            gate=contest.counts,
            target=MEMORY_TARGET,
            peer=rival,
            peer_value=ratio,
            used_bytes=usage.used_bytes,
            mapped_bytes=usage.mapped_bytes,
        )


class Contest:
    """Three caches with the same rows under one model."""

    def __init__(self, bench: Bench, layers: int, tokens: int, dtype: str) -> None:
        self.bench, self.tokens, self.dtype = bench, tokens, dtype
        self.model = make_model(layers, dtype, bench.seed)
        self.caches = {kind: make_cache(kind, self.model.config, tokens) for kind in KINDS}
        for cache in self.caches.values():
            fill(cache, layers, tokens, dtype, bench.seed)
        self.token = dict.fromkeys(KINDS, 1)
        self.stepped = 0

    def step(self, kind: str) -> torch.Tensor:
        """One greedy step of one cache; returns its logits."""
        logits = decode(self.model, self.caches[kind], self.token[kind])
        self.token[kind] = int(logits.argmax())
        return logits

    def agree(self, steps: int) -> bool:
        """All three give the same logits and pick the same tokens, and hold the same rows."""
        for turn in range(steps):
            logits = {kind: self.step(kind) for kind in KINDS}
            scale = float(logits["DynamicCache"].abs().max())
            for kind in KINDS:
                gap = float((logits[kind] - logits["DynamicCache"]).abs().max()) / scale
                assert gap <= TOLERANCE[self.dtype], (
                    f"step {turn}: logits of {kind} off by {gap:.2g}"
                )
            assert len(set(self.token.values())) == 1, f"step {turn}: tokens {self.token}"
        self.stepped += steps
        return self.same_rows()

    def same_rows(self) -> bool:
        """Every layer of every cache holds the rows of DynamicCache's."""
        for index, reference in enumerate(self.caches["DynamicCache"].layers):
            tokens = reference.keys.shape[2]
            for kind in KINDS:
                layer = self.caches[kind].layers[index]
                for side in ("keys", "values"):
                    rows = getattr(layer, side)[:, :, :tokens]
                    close = torch.allclose(rows, getattr(reference, side), rtol=0.02, atol=0.02)
                    assert close, f"{side} of layer {index} of {kind}"
        return True

    @cached_property
    def samples(self) -> dict[str, Sample]:
        """Seconds a step of each cache, in turn."""
        repeat = self.bench.pick(20, 5)
        steps = {kind: partial(self.step, kind) for kind in KINDS}
        return self.bench.race(steps, warmup=2, repeat=repeat)

    def versus(self, rival: str) -> Any:
        """Ours against one rival."""
        return self.bench.versus(self.samples["vattn"], self.samples[rival])

    def held(self, longest: int) -> dict[str, float]:
        """Bytes that the rivals hold for each byte of live rows."""
        layers = self.caches["DynamicCache"].layers
        live = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        tokens = layers[0].keys.shape[2]
        static = sum(
            layer.keys.nbytes // layer.keys.shape[2] * 2 * (longest + SPARE)
            for layer in self.caches["StaticCache"].layers
        )
        assert tokens <= longest + SPARE
        return {"DynamicCache": 1 + layers[0].keys.nbytes / live, "StaticCache": static / live}

    def counts(self) -> bool:
        """Our own count of live bytes is that of the rows which DynamicCache holds."""
        usage = self.caches["vattn"].stats()
        layers = self.caches["DynamicCache"].layers
        live = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert usage.used_bytes == live, f"{usage.used_bytes} bytes used, {live} in DynamicCache"
        assert usage.resident_bytes <= usage.mapped_bytes
        return True


# ---- model and caches ----------------------------------------------------------------------------
def make_model(layers: int, dtype: str, seed: int) -> Any:
    """The tiny model; every cache meets the same attention function."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import vattn.hf

    vattn.hf.register()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1 << 17,
        initializer_range=0.02 * SHARP,
        attn_implementation="vattn",
    )
    return LlamaForCausalLM(config).to(DTYPES[dtype]).eval()


def make_cache(kind: str, config: Any, tokens: int) -> Any:
    """An empty cache."""
    from transformers import DynamicCache, StaticCache

    from vattn.hf import VattnCache

    if kind == "DynamicCache":
        return DynamicCache(config=config)
    if kind == "StaticCache":
        return StaticCache(config=config, max_cache_len=tokens + SPARE)
    return VattnCache(config, max_tokens=tokens + SPARE)


def fill(cache: Any, layers: int, tokens: int, dtype: str, seed: int) -> None:
    """Give every layer the same random rows in every cache."""
    for k, v, layer in random_rows(layers, tokens, dtype, seed):
        cache.update(k, v, layer)


def random_rows(
    layers: int, tokens: int, dtype: str, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """K, V [1, KV_HEADS, n, HEAD_DIM] and their layer, chunk by chunk."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, tokens, CHUNK):
        shape = (2, 1, KV_HEADS, min(CHUNK, tokens - start), HEAD_DIM)
        for layer in range(layers):
            rows = ROW_SCALE * torch.randn(shape, generator=generator)
            yield *rows.to(DTYPES[dtype]), layer


@torch.no_grad()
def decode(model: Any, cache: Any, token: int) -> torch.Tensor:
    """Logits behind one more token."""
    out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
    logits: torch.Tensor = out.logits[0, -1].float()
    return logits


# ---- peak memory of a process --------------------------------------------------------------------
def rss(bench: Bench, layers: int, tokens: int) -> None:
    """Peak memory of one process for each cache, for each byte of live rows."""
    peaks = {}
    for kind in KINDS:
        code = PEAK.format(kind=kind, context=tokens, dtype="fp32", layers=layers, seed=bench.seed)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        peaks[kind] = json.loads(done.stdout.splitlines()[-1])
    ours = peaks["vattn"]
    for rival in TARGETS:
        bench.figure(
            f"hf_generate/fp32/{tokens // 1024}k/rss/beside_{rival}",
            ours["peak"] / ours["used"],
            "held/used",
            gate=ours["token"] == peaks[rival]["token"] and ours["peak"] >= ours["used"],
            peer=rival,
            peer_value=peaks[rival]["peak"] / ours["used"],
        )


def peak(kind: str, tokens: int, dtype: str, layers: int, seed: int) -> None:
    """Fill and decode in this process; print the peak of what it held more than before."""
    model = make_model(layers, dtype, seed)
    torch.set_num_threads(1)
    for warm_up in KINDS:
        cache = make_cache(warm_up, model.config, CHUNK)
        fill(cache, layers, CHUNK, dtype, seed)
        decode(model, cache, 1)
    del cache
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew
    before = memory("VmRSS")
    cache = make_cache(kind, model.config, tokens)
    fill(cache, layers, tokens, dtype, seed)
    token = 1
    for _ in range(3):
        token = int(decode(model, cache, token).argmax())
    used = (tokens + 3) * layers * 2 * KV_HEADS * HEAD_DIM * DTYPES[dtype].itemsize
    print(json.dumps({"peak": memory("VmHWM") - before, "used": used, "token": token}))


def memory(field: str) -> int:
    """A size in bytes of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise KeyError(field)
