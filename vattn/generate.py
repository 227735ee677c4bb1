"""Generate text with a local transformers model and a cache of choice, and measure both.

The network is never touched: models come from a directory, and a missing one is a `ModelError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vattn.allocator.errors import VattnError
from vattn.report import Timing
from vattn.request import SHIPPED_TEXT, Request, RequestError
from vattn.shape import ConfigError, ModelShape
from vattn.watch import Watch

if TYPE_CHECKING:
    import torch

    from vattn.evictor import Evictor
    from vattn.hf import Compressed
    from vattn.keeps import KeepLog
    from vattn.reads import ReadLog
    from vattn.selector import Selector

MOST_TOKENS = 16  # `kernels.kv.MOST_TOKENS`, without importing torch
# Tokens of a prompt read at once where not all of it need fit into the fast tier.
CHUNK_TOKENS = 512
# Of the prompt, for selectors that want to see keys first, and for latents.
CALIBRATION_TOKENS = 2048
# Points of the memory curve kept per run: enough for a picture, too few to slow the run down.
_SAMPLES = 256


class ModelError(VattnError, FileNotFoundError):
    """A model directory is missing or holds no usable model."""


@dataclass
class Run:
    """What one generation gave: tokens ``[batch, new]``, times, the memory curve and the cache."""

    tokens: torch.Tensor
    timing: Timing
    curve: list[tuple[int, int, int]]
    peak_bytes: int
    cache: Any
    reads: ReadLog | None = None
    keeps: KeepLog | None = None


class Generator:
    """A loaded model and its tokenizer, ready to run a `Request` with any cache.

    Raises:
        ModelError: the directory is missing, or holds no model or tokenizer that can be read.
    """

    def __init__(self, request: Request) -> None:
        _require_model(request.model)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from vattn import hf

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        hf.register()
        self.request = request
        dtype = request.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(request.model, local_files_only=True)
            self.model = AutoModelForCausalLM.from_pretrained(
                request.model,
                local_files_only=True,
                dtype=dtype,
                attn_implementation=request.attention,
            ).eval()
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"cannot load a model from {request.model}: {str(error).splitlines()[0]}"
            ) from error
        dtype_name = str(self.model.dtype).removeprefix("torch.")
        self.shape = ModelShape.from_config(self.model.config.to_dict(), dtype=dtype_name)
        self.ids, self.mask = self._prompt()
        self.selector = self._selector()
        self.policy = self._policy()
        if request.cache == "vattn":
            self._check_layout()

    @property
    def prompt_tokens(self) -> int:
        return int(self.ids.shape[1])

    @property
    def room(self) -> int:
        """Tokens that each sequence may reach."""
        return self.prompt_tokens + self.request.new_tokens

    def run(
        self,
        cache: str,
        *,
        on_text: Callable[[str], None] = lambda text: None,
        on_step: Callable[[int], None] = lambda step: None,
        curve: bool = False,
    ) -> Run:
        """Generate once with the named cache; the seed is set first, so that runs compare.

        With ``curve`` the memory is sampled as it grows.
        """
        with self._compressed(cache) as latents:
            return self._run(self._open(cache, latents), on_text, on_step, curve)

    def _run(
        self,
        store: Any,
        on_text: Callable[[str], None],
        on_step: Callable[[int], None],
        curve: bool,
    ) -> Run:
        import torch

        request = self.request
        every = max(1, request.new_tokens // _SAMPLES) if curve else None
        watch = Watch(on_text, on_step, self._decode, store, every)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": request.temperature}
        if not request.temperature:
            sampling = {"do_sample": False}
        if request.host_bytes is not None:
            step = request.host_bytes // 4 // (self.shape.bytes_per_token * request.batch)
            sampling["prefill_chunk_size"] = _chunk(self.prompt_tokens, min(CHUNK_TOKENS, step))
        torch.manual_seed(request.seed)
        with torch.inference_mode():
            self.model(self.ids[:, :1], use_cache=False)  # warm up: page in the weights
            _compile_kernel(self.model.dtype)
            output = self.model.generate(
                self.ids,
                attention_mask=self.mask,
                past_key_values=store,
                max_new_tokens=request.new_tokens,
                pad_token_id=self._pad(),
                streamer=watch,
                **sampling,
            )
        timing = Timing(watch.times[0], tuple(watch.times[1:]), request.batch)
        return Run(
            output[:, self.prompt_tokens :],
            timing,
            watch.curve,
            watch.peak_bytes,
            store,
            watch.reads,
            watch.keeps,
        )

    def text(self, run: Run, row: int = 0) -> str:
        return self._decode(run.tokens[row].tolist())

    def decode_prompt(self) -> str:
        """The first prompt as the model sees it."""
        return self._decode(self.ids[0][self.mask[0].bool()].tolist())

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _pad(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def _prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask ``[batch, n]``, shorter prompts padded on the left."""
        import torch

        request = self.request
        texts = request.prompts or (SHIPPED_TEXT.read_text(encoding="utf-8"),)
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        if not all(rows):
            raise RequestError("the prompt has no tokens; pass some text")
        rows = [list(rows[i % len(rows)]) for i in range(request.batch)]
        if request.context is not None:
            rows = [_fit(row, request.context) for row in rows]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad())
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        return ids, mask

    def _check_layout(self) -> None:
        """Find out now, not at the first token, whether the pages and rows asked for exist.

        Raises:
            LayoutError: they do not; the message names the field.
        """
        from vattn.layout import Layout

        shape = self.shape
        layout = Layout(shape.layers, shape.kv_heads, shape.head_dim, self.room, shape.dtype)
        asked = {"page_bytes": self.request.page_bytes, "rows": self.request.rows}
        layout.with_(**{name: value for name, value in asked.items() if value is not None})

    def _selector(self) -> Selector | None:
        if self.request.select is None:
            return None
        from vattn.policies.names import selector

        budget = self.request.budget_tokens(self.prompt_tokens)
        return selector(self.request.select, budget, self._keys)

    def _policy(self) -> Evictor | None:
        if self.request.policy is None:
            return None
        from vattn.evictors.names import evictor

        return evictor(self.request.policy, self.request.budget_given())

    def _keys(self) -> torch.Tensor:
        """Keys of the beginning of the first prompt, [layers, kv_heads, n, head_dim]."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        row = self.ids[0][self.mask[0].bool()][:CALIBRATION_TOKENS]
        with torch.inference_mode():
            self.model(row[None], past_key_values=cache)
        if len({layer.keys.shape for layer in cache.layers}) > 1:
            raise RequestError(
                f"--select {self.request.select} is calibrated with the keys of all layers, and "
                "some of this model slide: choose one without calibration, such as quest"
            )
        return torch.stack([layer.keys[0] for layer in cache.layers])

    @contextmanager
    def _compressed(self, cache: str) -> Iterator[Compressed | None]:
        """The model as our cache is to have it; other caches have it whole. The beginning of the
        first prompt is the sample."""
        share = self.request.lorc_share()
        if cache != "vattn" or share is None:
            yield None
            return
        from vattn.hf import compress

        row = self.ids[0][self.mask[0].bool()][:CALIBRATION_TOKENS]
        with compress(self.model, share, sample=row[None]) as latents:
            yield latents

    def _open(self, cache: str, latents: Compressed | None = None) -> Any:
        from transformers import DynamicCache, StaticCache

        config, request = self.model.config, self.request
        if cache == "dynamic":
            return DynamicCache(config=config)
        if cache == "static":
            return StaticCache(config=config, max_cache_len=self.room)
        from vattn.hf import VattnCache, outputs_of

        # Address space is free: reserve the model's whole context, whatever this request needs.
        options: dict[str, Any] = {"max_tokens": max(self.room, self.shape.max_positions or 0)}
        chosen = {
            "page_bytes": request.page_bytes,
            "rows": request.rows,
            "budget_bytes": request.budget_bytes,
            "trace": request.trace or None,
        }
        options.update({name: value for name, value in chosen.items() if value is not None})
        if self.selector is not None:
            options["selector"] = self.selector
        if self.policy is not None:
            options["policy"] = self.policy
            if "offline" in self.policy.caps.evidence:
                options["outputs"] = outputs_of(self.model)
        if latents is not None:
            options["latents"] = latents
        if request.host_bytes is not None:
            options["tiers"] = {"fast_bytes": request.host_bytes}
        return VattnCache(config, **options)


def _compile_kernel(dtype: torch.dtype) -> None:
    """Compile the CPU kernel of a dtype: that takes seconds, once a machine, and is not speed."""
    import torch

    from vattn.kernels import stream

    if dtype in stream.DTYPES and stream.available() is None:
        row = torch.zeros(1, 1, 1, 8, dtype=dtype)
        stream.stream(row, row, row)


def same_tokens(a: torch.Tensor, b: torch.Tensor) -> tuple[int, int]:
    """How many tokens of two outputs are equal, out of how many."""
    short = min(a.shape[1], b.shape[1])
    return int((a[:, :short] == b[:, :short]).sum()), max(a.numel(), b.numel())


def _chunk(tokens: int, most: int) -> int:
    """Tokens of a prompt to read at once, ``most`` or somewhat fewer: such that no rest is left
    that would be taken for decode steps."""
    for step in range(max(most, 2 * MOST_TOKENS), MOST_TOKENS, -1):
        if not 0 < tokens % step <= MOST_TOKENS:
            return step
    return max(most, 2 * MOST_TOKENS)


def _fit(tokens: list[int], count: int) -> list[int]:
    """Repeat or cut to ``count`` tokens."""
    return (tokens * (count // len(tokens) + 1))[:count]


def _require_model(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(
            f"model directory {path} does not exist. Pass --model DIR with a local transformers "
            "model (config.json, model.safetensors, tokenizer files); nothing is downloaded."
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"model directory {path} holds no config.json, so it is no model")
    try:
        ModelShape.from_file(path)
    except ConfigError as error:
        raise ModelError(f"model directory {path}: {error}") from error
