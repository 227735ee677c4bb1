"""Import directions: arrows point down only, and the allocator half never loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The modules of vattn/, highest row first. A module imports its own row and the rows below it,
# and everything in vattn/ may import vattn.allocator and vattn.kernels.
ROWS = [
    {"__main__"},
    {"cli"},
    {"present", "doctor", "example", "generate", "picture", "plan", "probe", "report", "show"}
    | {"watch", "catalog", "kept_picture", "request"},
    {"engine"},
    {"scheduler"},
    {"hf", "hf_attention", "hf_layers", "hf_sparse", "hf_static", "hf_store"}
    | {"hf_press", "hf_versions", "hf_watch"}
    | {"hf_batch", "hf_heads", "hf_kept", "hf_latent", "hf_latent_rows", "hf_lorc"}
    | {"speculate", "parallel"},
    {"dropin", "registry"},
    {"sdpa", "sdpa_op", "sdpa_checks", "sdpa_gpu", "sdpa_gpu_op", "paths", "paths_gpu", "policies"}
    | {"ragged", "ragged_gpu", "sparse", "selector", "reads", "calibrate"}
    | {
        "evictor",
        "evictors",
        "eviction",
        "heads",
        "heads_attention",
        "heads_order",
        "keeps",
        "narrow_attention",
    }
    | {"lorc"},
    {"records", "tiers", "tiers_pages", "narrow", "ranges"},
    {"prefix", "cache"},
    {
        "batch",
        "follower",
        "lengths",
        "tiers_history",
        "tiers_order",
        "reclaimer",
        "rows",
        "sequence",
        "slots",
        "track",
        "usage",
    },
    {"device", "tensor", "layout", "names", "shape"},
]
RANK = {name: rank for rank, row in enumerate(reversed(ROWS)) for name in row}

# What each part may import from outside the standard library.
ALLOCATOR_MAY = {"numpy", "cuda"}
TESTING_MAY = {"hypothesis"}  # parts of allocator/testing.py, which imports them when asked
KERNELS_MAY = {"llvmlite", "numba", "numpy", "torch", "triton"}
VATTN_MAY = {"numpy", "torch"}
FACE_MAY = VATTN_MAY | {"typer", "rich", "matplotlib", "transformers", "safetensors", "psutil"}
HF = {"hf", "hf_attention", "hf_layers", "hf_sparse", "hf_static", "hf_store"}
HF |= {"hf_press", "hf_versions", "hf_watch"}
HF |= {"hf_batch", "hf_heads", "hf_kept", "hf_latent", "hf_latent_rows", "hf_lorc"}
MAY = {
    "names": set(),
    "shape": set(),
    "scheduler": {"numpy"},
    **dict.fromkeys(HF, VATTN_MAY | {"transformers"}),
    **dict.fromkeys(ROWS[0] | ROWS[1] | ROWS[2], FACE_MAY),
}
# Heavy packages: outside of the adapter only inside the function that needs them.
LAZY = {"transformers", "matplotlib", "safetensors"}


@dataclass(frozen=True)
class Import:
    """One imported dotted name and where it stands."""

    name: str
    line: int
    lazy: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def imports(path: Path, package: str) -> Iterator[Import]:
    """Every import of a file, made absolute; those under TYPE_CHECKING are left out."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
    while pending:
        node, lazy = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, lazy) for child in node.orelse]
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            parts = [*(base if node.level else []), *filter(None, [node.module])]
            for alias in node.names:
                yield Import(".".join([*parts, alias.name]), node.lineno, lazy)
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        pending += [(child, inside) for child in ast.iter_child_nodes(node)]


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


def outside(found: Import, may: set[str]) -> bool:
    """Whether an import is neither standard library, nor ours, nor allowed."""
    return found.top not in sys.stdlib_module_names and found.top not in may | {"vattn"}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    ("folder", "may"), [("allocator", ALLOCATOR_MAY), ("kernels", KERNELS_MAY)]
)
def test_halves_know_nothing_above_them(folder, may):
    package = f"vattn.{folder}"
    for path in files(folder):
        for found in imports(path, package):
            place = f"{named(path)}:{found.line} imports {found.name}"
            more = TESTING_MAY if path.stem.startswith("testing_") else set()
            assert not outside(found, may | more), place
            assert found.top != "vattn" or found.name.startswith(package), place


def test_every_module_has_a_row():
    unknown = {path.stem for path in files("vattn")} - set(RANK) - {"__init__"}
    assert not unknown, f"give these modules a row in {named(Path(__file__))}: {sorted(unknown)}"


@pytest.mark.parametrize("path", files("vattn"), ids=lambda path: path.stem)
def test_vattn_imports_point_down(path):
    rank = RANK.get(path.stem, -1)
    for found in imports(path, "vattn"):
        place = f"{named(path)}:{found.line} imports {found.name}"
        assert not outside(found, MAY.get(path.stem, VATTN_MAY)), place
        assert found.lazy or path.stem in HF or found.top not in LAZY, f"{place} at its top"
        for target in found.name.split(".")[1:2] if found.top == "vattn" else []:
            assert RANK.get(target, -1) <= rank, f"{place}, which is above it"


@pytest.mark.parametrize("path", files("vattn/policies"), ids=lambda path: path.stem)
def test_policies_know_kernels_and_their_protocol_alone(path):
    """They own no memory: no cache, no allocator."""
    for found in imports(path, "vattn.policies"):
        place = f"{named(path)}:{found.line} imports {found.name}"
        assert not outside(found, {"torch"}), place
        if found.top == "vattn":
            below = ("vattn.kernels", "vattn.names", "vattn.policies", "vattn.selector")
            assert found.name.startswith(below), place


def test_modules_of_a_row_form_no_cycle():
    edges = {
        path.stem: {
            target
            for found in imports(path, "vattn")
            for target in found.name.split(".")[1:2]
            if found.top == "vattn" and not found.lazy and target in RANK and target != path.stem
        }
        for path in files("vattn")
    }
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert not edges, f"import cycle among {sorted(edges)}"


def test_nothing_imports_the_root_folders_bare():
    folders = ("vattn", "kernels", "allocator", "tests", "bench")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for found in imports(path, "vattn"):
            assert found.top not in ("kernels", "allocator"), f"{named(path)}:{found.line}"


def test_root_folders_are_namespaces():
    """With an __init__.py, a root folder `kernels` breaks `import transformers` from the root."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "allocator" / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    ["vattn", "vattn.allocator", *(f"vattn.allocator.{path.stem}" for path in files("allocator"))],
)
def test_allocator_half_loads_no_torch(module):
    code = f"import sys, {module}; print(*(sys.modules.keys() & {{'torch', 'transformers'}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_public_names_resolve():
    import vattn

    for name in vattn.__all__:
        assert getattr(vattn, name) is not None
        assert name in dir(vattn)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vattn.nonsense
