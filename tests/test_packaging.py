"""Wheel, sdist, lost links, and a root folder named kernels beside transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = [
    path.parent.relative_to(ROOT)
    for path in sorted((ROOT / "vattn").glob("*/__init__.py"))
    if not path.parent.is_symlink()
]
SOURCES = [
    path.relative_to(ROOT)
    for folder in ("vattn", *PARTS, "allocator", "kernels")
    for path in sorted((ROOT / folder).glob("*.py"))
]
INSTALLED = {source if source.parts[0] == "vattn" else Path("vattn") / source for source in SOURCES}
ASSETS = [
    path.relative_to(ROOT)
    for path in sorted((ROOT / "vattn" / "assets").rglob("*"))
    if path.is_file()
]

# Any name: a class to construct, a decorator factory to apply.
STAND_IN = """
def __getattr__(name):
    return type(name, (), {"__init__": lambda *a, **k: None, "__call__": lambda self, fn: fn})
"""


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command away from this process's own import paths and return its output."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_tree(to: Path, *, links: bool) -> Path:
    """The package's own files, as a clone has them, with or without the two links."""
    to.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    skip = shutil.ignore_patterns("__pycache__", *([] if links else ["kernels", "allocator"]))
    shutil.copytree(ROOT / "vattn", to / "vattn", symlinks=True, ignore=skip)
    for name in ("kernels", "allocator"):
        shutil.copytree(ROOT / name, to / name, ignore=skip if links else None)
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel that is built from it; nothing is downloaded."""
    place = tmp_path_factory.mktemp("build")
    tree = copy_tree(place / "tree", links=True)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist", cwd=tree)
    return place / "dist"


def test_sdist_holds_real_files(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {Path(*Path(m.name).parts[1:]) for m in archive.getmembers() if m.isfile()}
        assert not [m.name for m in archive.getmembers() if m.issym()]
    assert INSTALLED | set(ASSETS) | {Path("vattn/py.typed"), Path("LICENSE")} <= files


def test_wheel_holds_every_module_and_asset(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        files = {Path(name) for name in archive.namelist()}
    assert INSTALLED | set(ASSETS) | {Path("vattn/py.typed")} <= files
    assert not [name for name in files if name.parts[0] in ("kernels", "allocator", "tests")]


def test_wheel_imports_in_a_clean_environment(built, tmp_path):
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", next(built.glob("*.whl"))]
    call(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    # The dependencies come from this environment; a path file inside a path file is not read,
    # so this environment's own editable vattn stays out.
    site = Path(
        call(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    parts = [path.with_suffix("").parts for path in sorted(INSTALLED)]
    modules = ", ".join(".".join(part) for part in parts if part[1] in ("allocator", "kernels"))
    code = f"import vattn.kernels, {modules}; print(vattn.__file__, vattn.Layout)"
    report = call(python, "-c", code, cwd=tmp_path)
    assert report.startswith(str(site))
    assert (tmp_path / "venv" / "bin" / "vattn").exists()


def test_lost_links_fall_back_to_the_root_folders(tmp_path):
    tree = copy_tree(tmp_path / "tree", links=False)
    for name in ("kernels", "allocator"):
        (tree / "vattn" / name).write_text(f"../{name}")  # what core.symlinks=false leaves
    code = "import vattn.allocator.pool as p, vattn.kernels; print(p.__name__, p.__file__)"
    name, file = call(sys.executable, "-c", code, cwd=tree).split()
    assert name == "vattn.allocator.pool"
    assert Path(file) == tree / "allocator" / "pool.py"


def test_both_names_are_one_module():
    """The links are followed under one name only, so no module is loaded twice."""
    code = "import sys, vattn.allocator.pool; print({'allocator', 'kernels'} & set(sys.modules))"
    assert call(sys.executable, "-c", code, cwd=ROOT).strip() == "set()"


@pytest.mark.parametrize("peer", [None, "0.18.2"], ids=["alone", "with-kernels-0.18.2"])
def test_transformers_imports_from_the_root(peer, tmp_path):
    """Our folder ``kernels`` must neither count as, nor hide, the package of that name."""
    pytest.importorskip("transformers")
    if peer is not None:
        fake_kernels(tmp_path, peer)
    code = "import transformers.modeling_utils, sys; print(sys.modules.get('kernels'))"
    seen = call(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert (str(tmp_path) in seen) == (peer is not None)


def fake_kernels(folder: Path, version: str) -> None:
    """A stand-in for the package ``kernels`` that has every name one asks of it."""
    metadata = folder / f"kernels-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    )
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(STAND_IN)
