"""``python -m bench`` lists the benchmarks; ``python -m bench NAME [options]`` runs one.

``python -m bench all`` runs each in a process of its own. Exit codes: 0 all gates green,
1 a red gate or a benchmark that failed, 2 no such benchmark.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from bench.harness import Bench

FOLDER = Path(__file__).resolve().parent
COMMON = {
    "quick": (bool, False, typer.Option("--quick", help="Fewer rounds, smaller shapes.")),
    "json": (bool, False, typer.Option("--json", help="One JSON object a line.")),
    "seed": (int, 0, typer.Option("--seed", help="Seed of every random choice.")),
}


def benches(folder: Path = FOLDER) -> dict[str, str]:
    """Name and first docstring line of each module that has a ``run``, without importing it."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def listing() -> None:
    """Print the benchmarks there are."""
    table = Table("benchmark", "what it measures", box=None)
    for name, line in benches().items():
        table.add_row(name, line)
    console = Console()
    console.print("python -m bench NAME [--quick] [--json] [--seed N] [--help]", highlight=False)
    console.print(table)


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``run(bench, ...)`` for typer: common options first, then the parameters of ``run``."""

    def invoke(**options: Any) -> None:
        common = {name: options.pop(name) for name in COMMON}
        bench = Bench(quick=common["quick"], as_json=common["json"], seed=common["seed"])
        try:
            run(bench, **options)
        finally:
            bench.show()
        raise typer.Exit(bench.exit_code)

    hints = get_type_hints(run, include_extras=True)
    own = list(inspect.signature(run).parameters.values())[1:]
    only = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, only, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in COMMON.items()
    ]
    parameters += [each.replace(kind=only, annotation=hints[each.name]) for each in own]
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {each.name: each.annotation for each in parameters}
    invoke.__doc__ = inspect.getdoc(inspect.getmodule(run)) or inspect.getdoc(run)
    return invoke


def run_all(options: list[str]) -> int:
    """Run every benchmark with the same options, one process each; the worst exit code."""
    codes = [0]
    for name in benches():
        print(f"# {name}", file=sys.stderr, flush=True)
        codes.append(subprocess.run([sys.executable, "-m", "bench", name, *options]).returncode)
    return int(any(codes))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    name, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        listing()
        sys.exit(0)
    if name == "all":
        sys.exit(run_all(options))
    if name not in benches():
        print(f"no benchmark {name!r}; there are:", file=sys.stderr)
        listing()
        sys.exit(2)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    module = importlib.import_module(f"bench.{name}")
    app.command(name)(command(module.run))
    sys.exit(app(options, prog_name=f"python -m bench {name}"))


if __name__ == "__main__":
    main()
