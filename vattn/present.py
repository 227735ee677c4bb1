"""One generation as the user sees it: text as it comes, then tables, or one JSON object."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vattn.generate import Generator, Run, same_tokens
from vattn.report import (
    MemoryRow,
    memory_table,
    peer_rows,
    plain_table,
    size,
    step_peak,
    vattn_row,
)
from vattn.request import Request, RequestError, without_text
from vattn.watch import held

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PROMPT_LINES = 3


@dataclass(frozen=True)
class Outputs:
    """What to leave behind besides the text."""

    compare: bool = False
    plot: Path | None = None
    snapshot: Path | None = None
    json: bool = False


@dataclass
class Session:
    """A request carried out: the run, the stock run beside it, and where things go."""

    request: Request
    outputs: Outputs
    out: Console
    err: Console

    def __post_init__(self) -> None:
        pictures = self.outputs.plot or self.outputs.snapshot
        if pictures and self.request.cache != "vattn":
            raise RequestError(
                f"--plot and --snapshot draw vattn's pages; with --cache {self.request.cache} "
                "there are none. Use --cache vattn."
            )

    def carry_out(self) -> tuple[dict[str, Any], bool]:
        """Run everything; returns the report and whether the tokens were as they should be."""
        with self.err.status(f"loading {self.request.model}"):
            generator = Generator(self.request)
        self._warn(generator)
        run = self._measured(generator)
        stock = self._stock(generator) if self.outputs.compare else None
        report = build_report(generator, run, stock)
        report["files"] = self._pictures(generator, run) if self.request.cache == "vattn" else {}
        if not self.outputs.json:
            self._tables(generator, run, report)
        if self.request.cache == "vattn":
            run.cache.kv.close()
        return report, report["compare"]["identical"] if stock else True

    def _warn(self, generator: Generator) -> None:
        context = generator.shape.max_positions
        if context is not None and generator.room > context:
            self.err.print(
                f"note: {generator.room} tokens are more than the model's {context} positions",
                style="yellow",
            )

    def _measured(self, generator: Generator) -> Run:
        """The run that is reported: its text streams, unless a JSON object is wanted."""
        cache = self.request.cache
        if self.outputs.json:
            with self._progress(f"{cache} cache", generator) as on_step:
                return generator.run(cache, on_step=on_step, curve=self.outputs.plot is not None)
        self._show_prompt(generator)
        spinner = self.err.status(f"reading {generator.prompt_tokens} tokens")
        spinner.start()

        def on_text(text: str) -> None:
            spinner.stop()
            self._write(text, "bold")

        try:
            run = generator.run(cache, on_text=on_text, curve=self.outputs.plot is not None)
        finally:
            spinner.stop()
            self.out.print("\n")
        return run

    def _stock(self, generator: Generator) -> Run:
        """The same generation with transformers' own growing cache and the same attention."""
        with self._progress("DynamicCache, to compare", generator) as on_step:
            return generator.run("dynamic", on_step=on_step)

    @contextmanager
    def _progress(self, name: str, generator: Generator) -> Iterator[Callable[[int], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, console=self.err, transient=True) as progress:
            task = progress.add_task(name, total=self.request.new_tokens, rate="reading the prompt")

            def on_step(step: int) -> None:
                speed = progress.tasks[0].speed
                rate = f"{speed * self.request.batch:.0f} tokens/s" if speed else ""
                progress.update(task, completed=step, rate=rate)

            yield on_step

    def _show_prompt(self, generator: Generator) -> None:
        """The end of the first prompt, so that the text has something to go on from."""
        prompt = generator.decode_prompt()
        lines = prompt.splitlines(keepends=True)
        more = "[...]\n" if len(lines) > _PROMPT_LINES else ""
        tail = more + "".join(lines[-_PROMPT_LINES:])
        self._write(tail, "dim")

    def _write(self, text: str, style: str) -> None:
        """A piece of text exactly as it is, at once."""
        self.out.print(
            text, end="", style=style, markup=False, highlight=False, emoji=False, soft_wrap=True
        )
        self.out.file.flush()

    def _pictures(self, generator: Generator, run: Run) -> dict[str, str]:
        """Write the files that were asked for; returns their paths."""
        outputs, kv = self.outputs, run.cache.kv
        files: dict[str, str] = {}
        if outputs.plot:
            from vattn.kept_picture import draw_kept
            from vattn.picture import draw
            from vattn.show import map_of

            title = f"{generator.shape.name}, {generator.shape.layers} layers: "
            title += f"{generator.prompt_tokens:,} tokens read, {run.tokens.shape[1]:,} written"
            history = history_of(generator, run)
            if run.keeps is None:
                draw(outputs.plot, map_of(kv), history, reads_of(run), title=title)
            else:
                draw_kept(outputs.plot, run.keeps, history, title=title)
            files["plot"] = str(outputs.plot)
        if outputs.snapshot:
            from vattn.show import snapshot_of

            outputs.snapshot.write_bytes(pickle.dumps(snapshot_of(kv)))
            files["snapshot"] = str(outputs.snapshot)
        return files

    def _tables(self, generator: Generator, run: Run, report: dict[str, Any]) -> None:
        self.out.print(speed_table(self.request, report))
        self.out.print()
        self.out.print(memory_table(memory_rows(generator, run)))
        self.out.print()
        if "kept" in report:
            self.out.print(kept_table(run))
            self.out.print(maps_line(report["memory"]), highlight=False, soft_wrap=True)
        elif "map" in report:
            from vattn.show import MemoryMap, ascii_map, colored

            drawn = ascii_map(MemoryMap.from_dict(report["map"]), width=48)
            self.out.print(colored(drawn), soft_wrap=True)
            self.out.print(maps_line(report["memory"]), highlight=False, soft_wrap=True)
        if self.outputs.compare:
            self.out.print(verdict(report["compare"]))
        if "activity" in report:
            self.out.print(activity_line(run), highlight=False, soft_wrap=True)
        if "latents" in report:
            self.out.print(latents_line(report["latents"]), highlight=False, soft_wrap=True)
        if "tiers" in report:
            self.out.print(tiers_line(report["tiers"]), highlight=False, soft_wrap=True)
        for name, path in report["files"].items():
            self.out.print(f"{name} written to {path}", highlight=False, soft_wrap=True)


def build_report(generator: Generator, run: Run, stock: Run | None) -> dict[str, Any]:
    """The whole result as plain data (the ``--json`` object)."""
    rows = memory_rows(generator, run)
    kv = getattr(run.cache, "kv", None)
    report: dict[str, Any] = {
        "schema": "vattn.generate.v1",
        "request": without_text(generator.request),
        "model": {
            "name": generator.shape.name,
            "layers": generator.shape.layers,
            "kv_heads": generator.shape.kv_heads,
            "head_dim": generator.shape.head_dim,
            "dtype": generator.shape.dtype,
            "bytes_per_token": generator.shape.bytes_per_token,
        },
        "prompt_tokens": generator.prompt_tokens,
        "new_tokens": int(run.tokens.shape[1]),
        "texts": [generator.text(run, row) for row in range(run.tokens.shape[0])],
        "tokens": run.tokens.tolist(),
        "timing": run.timing.to_dict(),
        "memory": {**rows[0].to_dict(), **(run.cache.stats().to_dict() if kv is not None else {})},
        "computed": [row.to_dict() for row in rows if not row.measured],
    }
    if kv is not None:
        from vattn.show import map_of

        report["map"] = map_of(kv).to_dict()
    store = getattr(run.cache, "store", None)
    if store is not None and store.sparse is not None:
        report["activity"] = [asdict(layer) for layer in run.cache.activity()]
    if store is not None and store.kept is not None:
        report["kept"] = [{**asdict(layer), "share": layer.share} for layer in run.cache.kept()]
    if store is not None and store.latents is not None:
        made = store.latents.compressed
        report["latents"] = {"share": made.share, "ranks": made.ranks, "widths": made.widths}
    if store is not None and store.tiers is not None:
        report["tiers"] = store.tiers.stats().to_dict()
    if stock is not None:
        same, total = same_tokens(run.tokens, stock.tokens)
        report["compare"] = {
            "cache": "dynamic",
            "attention": generator.request.attention,
            "identical": same == total,
            "same_tokens": same,
            "tokens": total,
            "timing": stock.timing.to_dict(),
        }
    return report


def memory_rows(generator: Generator, run: Run) -> list[MemoryRow]:
    """The cache that ran, then the ones that did not."""
    lengths = _lengths(generator, run)
    peers = peer_rows(generator.shape, lengths, prompt=generator.prompt_tokens, room=generator.room)
    cache = generator.request.cache
    if cache == "vattn":
        return [vattn_row(run.cache.stats().to_dict(), run.peak_bytes), *peers]
    # The stock caches' shapes are known: what ran is measured, what it copied is computed.
    held_bytes, _ = held(run.cache)
    like = peers.pop(0 if cache == "dynamic" else 1)
    peak = held_bytes + (like.peak_bytes - like.mapped_bytes)
    name = "DynamicCache" if cache == "dynamic" else "StaticCache"
    used = min(like.used_bytes, held_bytes)
    return [MemoryRow(name, True, held_bytes, held_bytes, used, peak, like.copied_bytes), *peers]


def history_of(generator: Generator, run: Run) -> Any:
    """The memory curve of a run beside what the stock caches would hold."""
    from vattn.picture import History

    shape, batch, prompt = generator.shape, generator.request.batch, generator.prompt_tokens
    peers = peer_rows(shape, _lengths(generator, run), prompt=prompt, room=generator.room)
    dynamic = [(n, batch * step_peak(shape, prompt, n)) for n, _, _ in run.curve]
    return History(
        "tokens of a sequence",
        run.curve,
        levels={row.name: row.mapped_bytes for row in peers[1:]},
        curves={"DynamicCache while it grows": dynamic},
    )


def reads_of(run: Run) -> Any:
    """What the logged layer read, step by step, and where it lay; None where nothing was logged."""
    import numpy as np

    from vattn.picture import Reads

    log, store = run.reads, getattr(run.cache, "store", None)
    if log is None or store is None or not log.steps:
        return None
    sequence, kv = store.sequences[0], run.cache.kv
    tokens, page_tokens = sequence.length, max(1, int(kv.layout.tokens_per_page))
    shares, slow = log.shares(page_tokens, tokens), None
    if store.tiers is not None:
        steps, lived = store.tiers.timeline(sequence, log.layer)
        last = store.tiers.steps - log.steps + 1 + np.arange(log.steps)
        slow = lived[np.searchsorted(steps, last, side="right") - 1][:, : shares.shape[1]]
    return Reads(log.layer, page_tokens, shares, slow)


def activity_line(run: Run) -> str:
    """What share of the tokens the decode steps read, over layers; what moved between tiers."""
    found = run.cache.activity()
    read, there = sum(a.read for a in found), sum(a.there for a in found)
    dense = sum(a.dense_steps for a in found)
    steps = sum(a.steps for a in found)
    nbytes = run.cache.store.sparse.nbytes
    return (
        f"decode steps read {read / max(1, there):.1%} of the tokens ({dense:,} of {steps:,} layer "
        f"steps everything); index {size(nbytes)}"
    )


def kept_table(run: Run) -> Table:
    """What each layer has kept: of all heads and sequences together, and of a single head."""
    table = plain_table("Tokens kept")
    columns = ("layer", "tokens seen", "kept", "of a head", "rows evicted")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for layer, kept in enumerate(run.cache.kept()):
        low, high = min(kept.budgets), max(kept.budgets)
        held = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        table.add_row(f"{layer}", f"{kept.seen:,}", f"{kept.share:.1%}", held, f"{kept.evicted:,}")
    return table


def tiers_line(stats: dict[str, int]) -> str:
    """Where the pages lie and what moved."""
    uses = stats["hits"] + stats["misses"]
    found = f"; {stats['hits'] / uses:.1%} of the pages read lay in memory" if uses else ""
    return (
        f"memory {size(stats['fast_bytes'])} of {size(stats['fast_budget_bytes'])}, file "
        f"{size(stats['slow_bytes'])}; {size(stats['demoted_bytes'])} went there and "
        f"{size(stats['promoted_bytes'])} came back, {size(stats['copied_bytes'])} copied{found}"
    )


def latents_line(latents: dict[str, Any]) -> str:
    """How much of K and V is held, and in which layers."""
    ranks = ", ".join(map(str, latents["ranks"]))
    return (
        f"latents are {latents['share']:.1%} of K and V: of {max(latents['widths'])} numbers "
        f"{ranks} by layer; the map is that of layer 0"
    )


def speed_table(request: Request, report: dict[str, Any]) -> Table:
    """Times of the run, and of the stock run where there was one."""
    table = plain_table("Speed")
    table.add_column("cache", no_wrap=True)
    for column in ("tokens/s", "per token p50", "p99", "prompt read in"):
        table.add_column(column, justify="right", no_wrap=True)
    runs = {request.cache: report["timing"]}
    if "compare" in report:
        runs["dynamic, to compare"] = report["compare"]["timing"]
    for name, timing in runs.items():
        table.add_row(
            name,
            f"{timing['tokens_per_second']:.1f}",
            f"{timing['step_seconds_p50'] * 1e3:.2f} ms",
            f"{timing['step_seconds_p99'] * 1e3:.2f} ms",
            f"{timing['prefill_seconds']:.2f} s",
        )
    return table


def maps_line(memory: dict[str, Any]) -> str:
    """How many pages and kernel maps, and the quotient that says what paging costs."""
    return (
        f"{memory['pages']:,} pages in {memory['maps']:,} kernel maps "
        f"(limit {memory['map_limit']:,}); mapped / used = "
        f"{memory['mapped_bytes'] / max(1, memory['used_bytes']):.3f}"
    )


def verdict(compared: dict[str, Any]) -> str:
    """The line that says whether the tokens were the stock cache's."""
    yes = "[bold green]yes[/]" if compared["identical"] else "[bold red]no[/]"
    return (
        f"tokens identical to DynamicCache: {yes} "
        f"({compared['same_tokens']}/{compared['tokens']}, attention {compared['attention']})"
    )


def _lengths(generator: Generator, run: Run) -> list[int]:
    """Tokens in the cache at the end: the last token was never run through the model."""
    return [generator.prompt_tokens + int(run.tokens.shape[1]) - 1] * generator.request.batch
