"""What this machine can do, what vattn would choose on it, and why."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import resource
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vattn.allocator.flight import FlightRecorder
from vattn.allocator.host import MAP_LIMIT_SHARE, max_map_count, process_maps
from vattn.probe import Probe, host_probes, read_setting
from vattn.report import size

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("torch", "triton", "transformers", "cuda-bindings", "numpy", "matplotlib", "rich")
# Without these the host backend cannot hold a cache.
_VITAL = ("reserve 1 TiB", "map and alias", "map a page", "protect a page")
_FILES_WANTED = 1024
_MAPS_WANTED = 65_530
_VMM_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_THP = "/sys/kernel/mm/transparent_hugepage/"
_MARKS = {"good": "[green]ok[/]", "fair": "[yellow]!![/]", "bad": "[red]XX[/]", "plain": "  "}


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` is good, fair (works, could be better), bad, or plain (a mere fact)."""

    name: str
    value: str
    state: str = "plain"
    note: str = ""


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as its driver describes it."""

    name: str
    memory_bytes: int
    vmm: bool


@dataclass(frozen=True)
class Choice:
    """One decision that vattn takes here, and the reason."""

    what: str
    chosen: str
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `examine` found."""

    system: tuple[Finding, ...]
    packages: tuple[Finding, ...]
    kernel: tuple[Finding, ...]
    probes: tuple[Probe, ...]
    gpus: tuple[Gpu, ...]
    gpu: tuple[Finding, ...]
    choices: tuple[Choice, ...]

    @property
    def healthy(self) -> bool:
        """True where the host backend can hold a cache."""
        return all(probe.works for probe in self.probes if probe.name in _VITAL)

    def to_dict(self) -> dict[str, Any]:
        def named(findings: Iterable[Finding]) -> dict[str, Any]:
            return {f.name: {"value": f.value, "state": f.state, "note": f.note} for f in findings}

        return {
            "schema": "vattn.doctor.v1",
            "healthy": self.healthy,
            "system": named(self.system),
            "packages": named(self.packages),
            "kernel": named(self.kernel),
            "probes": [probe.to_dict() for probe in self.probes],
            "gpu": named(self.gpu),
            "gpus": [asdict(gpu) for gpu in self.gpus],
            "choices": [asdict(choice) for choice in self.choices],
        }


def examine() -> Diagnosis:
    """Look at the machine and try what the host backend needs."""
    probes = tuple(host_probes())
    gpus = tuple(find_gpus())
    return Diagnosis(
        system=tuple(_system()),
        packages=tuple(_packages()),
        kernel=tuple(_kernel()),
        probes=probes,
        gpus=gpus,
        gpu=tuple(_gpu_findings(gpus)),
        choices=tuple(_choices(probes, gpus)),
    )


def _system() -> list[Finding]:
    memory = _meminfo()
    total, free = memory.get("MemTotal", 0), memory.get("MemAvailable", 0)
    return [
        Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        Finding("python", platform.python_version()),
        Finding("cores", str(len(os.sched_getaffinity(0)))),
        _bfloat16(),
        Finding("memory", f"{size(total)}, {size(free)} available"),
        Finding("page size", size(os.sysconf("SC_PAGE_SIZE")), note="the least a page can be here"),
    ]


def _bfloat16() -> Finding:
    """Whether the processor multiplies bfloat16 by itself."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return Finding("bfloat16 units", "unknown")
    units = sorted(words & {"amx_bf16", "avx512_bf16", "bf16"})
    if units:
        return Finding("bfloat16 units", ", ".join(units), "good")
    return Finding("bfloat16 units", "none", note="float32 models run faster here")


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name, importlib.metadata.version(name), "good"))
        except importlib.metadata.PackageNotFoundError:
            state = "bad" if name == "torch" else "plain"
            findings.append(Finding(name, "not installed", state))
    return findings


def _kernel() -> list[Finding]:
    limit, in_use = max_map_count(), process_maps()
    usable = int(limit * MAP_LIMIT_SHARE)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    overcommit = read_setting("/proc/sys/vm/overcommit_memory") or "unknown"
    return [
        Finding(
            "vm.max_map_count",
            f"{limit:,} ({in_use:,} in use, vattn stops at {usable:,})",
            "good" if limit >= _MAPS_WANTED else "fair",
            "" if limit >= _MAPS_WANTED else f"raise it: sysctl vm.max_map_count={_MAPS_WANTED}",
        ),
        Finding(
            "vm.overcommit_memory",
            overcommit,
            "fair" if overcommit == "2" else "good",
            "strict accounting: reservations are MAP_NORESERVE but may still be counted"
            if overcommit == "2"
            else "",
        ),
        Finding(
            "open files",
            f"{files:,}",
            "good" if files >= _FILES_WANTED else "fair",
            "one per cache" if files >= _FILES_WANTED else "raise it: ulimit -n 1024",
        ),
        Finding(
            "address space limit",
            "none" if space == resource.RLIM_INFINITY else size(space),
            "good" if space == resource.RLIM_INFINITY else "fair",
            "" if space == resource.RLIM_INFINITY else "reservations count: lift ulimit -v",
        ),
        Finding("transparent huge pages", read_setting(_THP + "enabled") or "none"),
        Finding(
            "huge pages for memfd",
            read_setting(_THP + "shmem_enabled") or "none",
            note="never: only a request (MADV_COLLAPSE) makes one",
        ),
    ]


def find_gpus() -> list[Gpu]:
    """The CUDA devices that the driver names; none where there is no driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        total_memory = cuda.cuDeviceTotalMem_v2
    except (OSError, AttributeError):  # none, or one that is too old to serve
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    gpus = []
    for ordinal in range(count.value):
        device, vmm = ctypes.c_int(), ctypes.c_int()
        name, total = ctypes.create_string_buffer(128), ctypes.c_size_t()
        failed = (
            cuda.cuDeviceGet(ctypes.byref(device), ordinal)
            or cuda.cuDeviceGetName(name, len(name), device)
            or total_memory(ctypes.byref(total), device)
            or cuda.cuDeviceGetAttribute(ctypes.byref(vmm), _VMM_SUPPORTED, device)
        )
        if not failed:
            gpus.append(Gpu(name.value.decode(), total.value, bool(vmm.value)))
    return gpus


def _gpu_findings(gpus: tuple[Gpu, ...]) -> list[Finding]:
    if not gpus:
        return [Finding("device", "none", note="the host backend needs none")]
    driver = read_setting("/proc/driver/nvidia/version") or "unknown"
    findings = [
        Finding(f"device {i}", f"{gpu.name}, {size(gpu.memory_bytes)}", "good")
        for i, gpu in enumerate(gpus)
    ]
    findings.append(Finding("driver", driver.splitlines()[0]))
    findings.append(
        Finding(
            "virtual memory management",
            "yes" if all(gpu.vmm for gpu in gpus) else "no",
            "good" if all(gpu.vmm for gpu in gpus) else "fair",
        )
    )
    bindings = _importable("cuda.bindings")
    findings.append(
        Finding(
            "cuda.bindings",
            "importable" if bindings else "not importable",
            "good" if bindings else "fair",
            "" if bindings else "pip install cuda-bindings",
        )
    )
    return [*findings, *_pages_given(gpus)] if bindings else findings


def _pages_given(gpus: tuple[Gpu, ...]) -> list[Finding]:
    """The kinds of pages that each device gives, tried by making one."""
    from vattn.allocator.errors import VattnError
    from vattn.allocator.probe import survey

    findings = []
    for ordinal in range(len(gpus)):
        try:
            kinds = survey(ordinal)
        except VattnError as error:
            findings.append(Finding(f"pages of device {ordinal}", "not tried", "fair", str(error)))
            continue
        findings += [
            Finding(f"pages of {kind}", "given" if why is None else "refused", "plain", why or "")
            for kind, why in kinds.items()
        ]
    return findings


def _choices(probes: tuple[Probe, ...], gpus: tuple[Gpu, ...]) -> list[Choice]:
    works = {probe.name: probe.works for probe in probes}
    backend = _backend_choice(gpus)
    collapse = works.get("huge page on request", False)
    return [
        backend,
        Choice(
            "rows",
            "head_major",
            "a head's tokens lie side by side, which plain torch attention on a CPU reads fastest",
        ),
        Choice(
            "page size",
            "about 32 tokens of a lane, a power of two from 4 KiB to 2 MiB",
            "half a page is lost per lane, so pages follow the row: see `vattn plan CONFIG.json`",
        ),
        Choice(
            "huge pages",
            "on request (allocator.warm)" if collapse else "none",
            "MADV_COLLAPSE works here" if collapse else "the kernel refuses MADV_COLLAPSE",
        ),
        Choice(
            "attention",
            "vattn (packed query heads, torch)",
            "on the CPU torch's own grouped-query decode reads K and V once per query head",
        ),
    ]


def _backend_choice(gpus: tuple[Gpu, ...]) -> Choice:
    if not gpus:
        return Choice("backend", "host", "no CUDA device: pages are memfd pages, mapped with mmap")
    if _importable("vattn.allocator.cuda"):
        return Choice("backend", "cuda for tensors on a GPU, host otherwise", "as the tensors ask")
    return Choice("backend", "host", "this version of vattn keeps pages in host memory only")


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _meminfo() -> dict[str, int]:
    """``/proc/meminfo`` in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in lines)
        if rest.strip().endswith("kB")
    }


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Print the diagnosis for people."""
    from rich.table import Table

    sections = {
        "system": diagnosis.system,
        "packages": diagnosis.packages,
        "kernel": diagnosis.kernel,
        "tried on this machine": [
            Finding(p.name, p.value, "good" if p.works else _missing(p), p.note)
            for p in diagnosis.probes
        ],
        "gpu": diagnosis.gpu,
    }
    for title, findings in sections.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        for column in ("", "name", "value", "note"):
            table.add_column(column, style="dim" if column == "note" else "")
        table.show_header = False
        for f in findings:
            table.add_row(_MARKS[f.state], f.name, f.value, f.note)
        console.print(table)
        console.print()
    table = Table(title="what would be chosen", title_justify="left", title_style="bold")
    for column in ("what", "chosen", "why"):
        table.add_column(column)
    for choice in diagnosis.choices:
        table.add_row(choice.what, choice.chosen, choice.why)
    console.print(table)
    verdict = (
        "[green]healthy[/]: the host backend works here"
        if diagnosis.healthy
        else "[red]unhealthy[/]: the host backend cannot work here; see the lines marked XX"
    )
    console.print(verdict)


def render_flights(path: Path, console: Console, last: int) -> None:
    """Print the ``last`` changes of mappings that `FlightRecorder.save` wrote, newest last.

    Raises:
        VattnError: the file holds something else. OSError: it cannot be read.
    """
    from datetime import datetime

    for flight in FlightRecorder.load(path)[-last:]:
        when = datetime.fromtimestamp(flight.time_ns / 1e9).isoformat(timespec="microseconds")
        page = "" if flight.page is None else f" from page {flight.page}"
        text = (
            f"{when}  thread {flight.thread}  {flight.verb:7}  {flight.address:#x}  "
            f"{flight.pages} pages{page}, after {flight.waits} waits"
        )
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def _missing(probe: Probe) -> str:
    return "bad" if probe.name in _VITAL else "fair"
