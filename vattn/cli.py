"""The ``vattn`` command: generate, map, plan, policies, doctor.

Every command takes ``--json`` and then prints one JSON object on stdout and nothing else. What a
user can set right is one line on stderr and exit code 2. Torch is imported only by the commands
that compute, so ``vattn --help`` is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("vattn: the command needs typer and rich: pip install 'vattn[cli]'") from None

from vattn.allocator.errors import VattnError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="The KV cache of a language model in contiguous virtual memory, paged on demand.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="PNG", help="Draw the memory map and its history.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
PageBytes = Annotated[
    str | None, typer.Option(help="Bytes of a page, such as 65536, 64K or 2M. Default: by formula.")
]
Rows = Annotated[str | None, typer.Option(help="head_major (the default) or token_major.")]


def main() -> None:
    """Entry point of the ``vattn`` command and of ``python -m vattn``."""
    app()


@app.command()
def generate(
    model: Annotated[
        Path | None, typer.Option(help="A local transformers model directory. Default: ours.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="The prompt; repeat it for the rows of a batch.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences at once. Default: one for each prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 256,
    context: Annotated[
        int | None, typer.Option(help="Repeat or cut the prompt to this many tokens.")
    ] = None,
    cache: Annotated[str, typer.Option(help="vattn, dynamic or static.")] = "vattn",
    attn: Annotated[str, typer.Option(help="vattn, sdpa or eager.")] = "vattn",
    dtype: Dtype = "auto",
    page_bytes: PageBytes = None,
    rows: Rows = None,
    memory: Annotated[
        str | None, typer.Option(help="Most bytes of pages, such as 512M. Default: 80% of memory.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(help="Read few tokens at a step: quest, signs, two-stage, ..."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Tokens that --select may read or --policy keeps, or 25% of the prompt, say."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Keep few tokens, and their memory: h2o, snapkv, ... (vattn policies)."),
    ] = None,
    lorc: Annotated[
        str | None,
        typer.Option(
            help="Keep every token in this share of the bytes, such as 50%: latents of K and V."
        ),
    ] = None,
    host_tier: Annotated[
        str | None, typer.Option(help="Most bytes of pages in memory; the others lie in a file.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    compare: Annotated[
        bool, typer.Option(help="Also run DynamicCache; exit 1 unless every token is equal.")
    ] = False,
    plot: Plot = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(
            metavar="PICKLE",
            help="Map and unmap events for torch's viewer (python -m torch.cuda._memory_viz).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write text with a local model and report speed and memory.

    By default our own small model, in float32, goes on with a passage of "Persuasion".
    Nothing is downloaded.
    """
    with plain_errors():
        from vattn.present import Outputs, Session
        from vattn.request import SHIPPED_MODEL, Request

        request = Request(
            model=model or SHIPPED_MODEL,
            prompts=_prompts(prompt, prompt_file),
            batch=max(1, len(prompt or ())) if batch is None else batch,
            new_tokens=max_new_tokens,
            context=context,
            cache=cache,
            attention=attn,
            dtype="float32" if model is None and dtype == "auto" else dtype,
            page_bytes=parse_bytes(page_bytes, "--page-bytes"),
            rows=rows,
            budget_bytes=parse_bytes(memory, "--memory"),
            select=select,
            budget=budget,
            policy=policy,
            lorc=lorc,
            host_bytes=parse_bytes(host_tier, "--host-tier"),
            seed=seed,
            temperature=temperature,
            trace=snapshot is not None,
        )
        outputs = Outputs(compare, _writable(plot), _writable(snapshot), as_json)
        report, as_expected = Session(request, outputs, *consoles()).carry_out()
        if as_json:
            print_json(report)
    if not as_expected:
        raise typer.Exit(1)


@app.command("map")
def draw_map(
    from_json: Annotated[
        Path | None,
        typer.Option(help="Draw a map saved by `vattn generate --json` or `vattn map --json`."),
    ] = None,
    page_bytes: PageBytes = "4096",
    rows: Rows = None,
    width: Annotated[int, typer.Option(min=8, help="Characters of a line of pages.")] = 64,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Draw which pages back which tokens: live, shared, partly filled, retained.

    Without --from-json a small cache lives through appends, a fork, a shared prefix, a truncation,
    a sliding window and a close, and its map is drawn.
    """
    with plain_errors():
        from vattn.show import ascii_map, colored

        history = None
        if from_json is not None:
            memory = _saved_map(from_json)
        else:
            from vattn.example import live_through

            memory, history = live_through(parse_bytes(page_bytes, "--page-bytes"), rows)
        if _writable(plot) is not None:
            from vattn.picture import draw

            draw(Path(str(plot)), memory, history, title="A KV cache in contiguous virtual memory")
        if as_json:
            print_json(memory.to_dict())
            return
        out, _ = consoles()
        out.print(colored(ascii_map(memory, width=width)), soft_wrap=True)
        if plot is not None:
            out.print(f"\nplot written to {plot}", highlight=False, soft_wrap=True)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A transformers config.json, or its directory.")],
    tokens: Annotated[
        list[int] | None, typer.Option(help="Lengths to give the waste at; repeatable.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens reserved per sequence. Default: the model's context."),
    ] = None,
    dtype: Dtype = "auto",
    target: Annotated[str, typer.Option(help="host or cuda: the page sizes to consider.")] = "host",
    as_json: Json = False,
) -> None:
    """Weigh layouts and page sizes for a model, and recommend one."""
    with plain_errors():
        from vattn.plan import make_plan, render
        from vattn.shape import ModelShape

        shape = ModelShape.from_file(config, dtype=None if dtype == "auto" else dtype)
        made = make_plan(shape, tokens=tokens or (1366,), max_tokens=max_tokens, target=target)
        if as_json:
            print_json(made.to_dict())
        else:
            render(made, consoles()[0])


@app.command()
def policies(as_json: Json = False) -> None:
    """List what --policy may keep by, --select read by, and --lorc hold."""
    with plain_errors():
        from vattn.catalog import rows, tables

        listed = rows()
        if as_json:
            print_json({"schema": "vattn.policies.v1", "policies": [asdict(row) for row in listed]})
            return
        out, _ = consoles()
        for table in tables(listed):
            out.print(table)
        out.print("* needs more than a command line says: see its docstring", highlight=False)


@app.command()
def doctor(
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Only print the last map changes, as `backend.flights.save(FILE)` wrote them.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can do, what would be chosen, and why. Exit 1 if nothing can work."""
    with plain_errors():
        from vattn.doctor import examine, render, render_flights

        if trace is not None:
            render_flights(trace, consoles()[0], last=200)
            return
        diagnosis = examine()
        if as_json:
            print_json(diagnosis.to_dict())
        else:
            render(diagnosis, consoles()[0])
    if not diagnosis.healthy:
        raise typer.Exit(1)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can set right becomes one line on stderr and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = {"transformers": "hf", "matplotlib": "plot"}.get(error.name or "")
        if extra is None:
            raise
        _complain(f"this needs {error.name}: pip install 'vattn[{extra}]'")
    except (VattnError, OSError) as error:
        _complain(f"{type(error).__name__}: {error}")


def _complain(text: str) -> NoReturn:
    typer.echo(f"vattn: {' '.join(text.split())}", err=True)
    raise typer.Exit(2)


def consoles() -> tuple[Console, Console]:
    """Consoles for stdout and stderr, made late so that a redirected stream is respected."""
    from rich.console import Console

    return Console(), Console(stderr=True)


def print_json(report: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    json.dump(report, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


class OptionError(VattnError, ValueError):
    """An option has a value that cannot be read."""


def parse_bytes(text: str | None, option: str) -> int | None:
    """``65536``, ``64K``, ``64KiB``, ``2M`` or ``1G`` as bytes.

    Raises:
        OptionError: it is none of those, or not positive.
    """
    if text is None:
        return None
    plain = text.strip().upper().removesuffix("IB").removesuffix("B")
    shift = {"K": 10, "M": 20, "G": 30, "T": 40}.get(plain[-1:], 0)
    try:
        value = int(float(plain[:-1] if shift else plain) * (1 << shift))
    except (ValueError, OverflowError):
        value = 0
    if value <= 0:
        raise OptionError(f"{option} takes bytes such as 65536, 64K or 2M, got {text!r}")
    return value


def _prompts(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    if given and file:
        raise OptionError("pass --prompt or --prompt-file, not both")
    return (file.read_text(encoding="utf-8"),) if file else tuple(given or ())


def _writable(path: Path | None) -> Path | None:
    """A path to write to whose folder exists: found out before the work, not after."""
    if path is not None and not path.absolute().parent.is_dir():
        raise OptionError(f"cannot write {path}: the folder {path.parent} does not exist")
    return path


def _saved_map(path: Path) -> Any:
    from vattn.show import MapError, MemoryMap

    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MapError(f"{path} is no JSON: {error}") from error
    if not isinstance(saved, dict):
        raise MapError(f"{path} holds a {type(saved).__name__}; pass what `vattn map --json` wrote")
    return MemoryMap.from_dict(saved)
