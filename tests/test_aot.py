"""The compile gate: it refuses what is bad, names it, and our kernels pass."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.compiled import ptx, sass, table
from bench.compiled.code import Code, programs
from bench.compiled.need import TILES, Need
from bench.compiled.plan import Done, Job

ROOT = Path(__file__).resolve().parent.parent
REFUSED = {
    "good": "",
    "paged": "at an address that it loaded",
    "narrow": "64 of 64 global loads in the hot loop are narrower than 128 bits",
    "spills": "bytes, 0 allowed",
    "large": "out of resource: shared memory",
    "refused": "this kernel is never compiled",
    "dies": "the compiler ended its process, exit code 7",
}
CODE = Code(
    registers=100,
    spill_bytes=0,
    stack_bytes=0,
    shared_bytes=72 << 10,
    threads=128,
    programs=3,
    instructions=900,
    loop_instructions=300,
    loop_matrix=32,
    loop_loads=16,
    loop_narrow=0,
    dependent_loads=0,
    mix={"mma": 32, "async_copies": 48, "wide_loads": 48},
)

# Two nested loops; the inner one, with matrix instructions, is left by a branch in its middle.
FILLER = "\n".join(f"        /*{0x50 + 16 * i:04x}*/    IMAD R1, R2, R3, R4 ;" for i in range(20))
LISTING = f"""
        /*0000*/                   LDG.E R16, desc[UR12][R4.64] ;
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R7], desc[UR12][R10.64], P6 ;
        /*0020*/                   HMMA.16816.F32.BF16 R44, R32.reuse, R40, RZ ;
        /*0030*/               @P1 BRA 0xf10 ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
{FILLER}
        /*0f00*/              @!P1 BRA P2, 0x10 ;
        /*0f10*/                   STL.64 [R1+0x8], R4 ;
        /*0f20*/                   LDL.LU R5, [R1+0x8] ;
        /*0f30*/              @UP0 BRA.U 0x0 ;
        /*0f40*/                   EXIT ;
        /*0f50*/                   BRA 0xf50;
"""


def environment() -> dict[str, str]:
    """Without the variable that makes Triton interpret, which other tests set."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def python(*arguments: str) -> str:
    """What a child process prints."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def said() -> Any:
    """What the gate says of each of the bad kernels, and what it asks of the compiler for ours."""
    return json.loads(python("-c", "from tests.aot_kernels import main; main()"))


@pytest.mark.parametrize("form", REFUSED)
def test_bad_kernels_are_refused_by_name(said: Any, form: str) -> None:
    text, lines = REFUSED[form], said["bad"][form]
    if not text:
        assert lines == []
    else:
        assert any(text in line and f"{form} sm_90" in line for line in lines)


def launched() -> set[str]:
    """The kernels of ours that some launcher launches: ``name[grid](...)``, by their modules."""
    found = set()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.func if isinstance(node, ast.Call) else None
            if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name):
                found.add(call.value.id)
    return found


def test_every_kernel_is_compiled_for_every_architecture(said: Any) -> None:
    asked: dict[int, set[str]] = {}
    for arch, *keys in said["asked"]:
        names = {key.partition(" ")[0].rpartition(".")[2] for key in keys}
        asked.setdefault(arch, set()).update(names)
    assert len(launched()) >= 10
    for arch in (80, 90, 100):
        elsewhere = {name for name in launched() if arch != 90 and "hopper" in name}
        assert launched() - elsewhere <= asked[arch]


@pytest.mark.slow
def test_decode_passes_the_gate() -> None:
    lines = python("-m", "bench", "aot", "--only", "decode/bf16/d128/two_launches", "--json")
    figures = {figure["name"]: figure for figure in map(json.loads, lines.splitlines())}
    assert figures["aot/kernels"]["value"] >= 6  # decode and join, three architectures
    assert figures["aot/spilled"]["value"] == 0


def test_the_hot_loop_is_the_innermost_with_matrix_instructions() -> None:
    code = sass.parse(LISTING)
    assert len(code) == 31
    loop = sass.hot_loop(code)
    assert (loop[0].address, loop[-1].address, len(loop)) == (0x10, 0xF00, 25)
    counts = sass.mix(loop)
    assert counts == {"async_copies": 1, "wide_loads": 1, "mma": 1, "exp2": 1}


def test_spilled_bytes_are_the_widths_of_local_accesses() -> None:
    assert sass.spilled(sass.parse(LISTING)) == 8 + 4


@pytest.mark.parametrize("op", ["FFMA", "IADD3"])
def test_without_matrix_instructions_the_loop_that_works_most_is_hot(op: str) -> None:
    code = sass.parse(LISTING.replace("HMMA.16816.F32.BF16", op))
    assert len(sass.hot_loop(code)) == 25
    assert sass.hot_loop(sass.parse("        /*0000*/    EXIT ;")) == []


LOOP = """
	ld.global.b32 	{ %r9 }, [ %rd9 + 0 ];
	mul.wide.s32 	%rd1, %r9, 16;
$L__BB0_2:
	LINE
	add.s64 	%rd3, %rd1, %rd2;
	cp.async.cg.shared.global [ %r46 + 0 ], [ %rd3 + 0 ], 0x10, %r55;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
	@%p1 bra 	$L__BB0_2;
"""


@pytest.mark.parametrize(
    ("line", "dependent"),
    [
        ("ld.global.b32 { %r7 }, [ %rd7 + 0 ];\n\tmul.wide.s32 %rd2, %r7, 256;", 1),
        ("@%p2 ld.shared.b32 %r7, [ %r8 ];\n\tcvt.s64.s32 \t%rd2, %r7;", 1),
        ("ld.global.v4.b32 { %r7, %r8, %r9, %r6 }, [ %rd7 + 0 ];\n\tmov.b64 %rd2, {%r1, %r6};", 1),
        ("ld.global.b32 { %r7 }, [ %rd7 + 0 ];\n\tsetp.lt.s32 %p3, %r7, 5;", 0),
        ("add.s64 \t%rd2, %rd2, 256;", 0),
    ],
)
def test_a_load_at_a_loaded_address_is_seen(line: str, dependent: int) -> None:
    assert ptx.dependent_loads(LOOP.replace("LINE", line)) == dependent


def test_programs_of_a_processor_follow_from_registers_threads_and_shared_memory() -> None:
    assert programs(80, 128, 128, 0, None) == 4
    assert programs(80, 129, 128, 0, None) == 3  # given out in eights: 136
    assert programs(90, 32, 128, 113 << 10, None) == 2
    assert programs(80, 32, 128, 113 << 10, None) == 1
    assert programs(100, 32, 512, 0, 256) == 2
    assert programs(90, 255, 384, 0, None) == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"programs": 0}, "does not fit"),
        ({"spill_bytes": 4}, "spills 4 bytes"),
        ({"mix": {"async_copies": 48}}, "no mma"),
        ({"loop_matrix": 0}, "no loop with matrix"),
        ({"loop_narrow": 1}, "narrower"),
        ({"dependent_loads": 2}, "2 loads"),
    ],
)
def test_each_need_is_checked(change: dict[str, object], text: str) -> None:
    need = Need(matrix=TILES, narrow=0)
    assert need.failures(80, CODE) == []
    (said,) = need.failures(80, replace(CODE, **change))
    assert text in said


def test_warps_must_be_specialised_where_a_kernel_says_so() -> None:
    need = Need(specialised=(90,))
    assert need.failures(80, CODE) == []
    assert need.failures(90, CODE) == ["warps are not specialised: no setmaxnreg"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"registers": 109}, "registers: 100 before, 109 now"),
        ({"spill_bytes": 8}, "bytes spilled: 0 before, 8 now"),
        ({"programs": 2}, "programs on a processor: 3 before, 2 now"),
        ({"loop_instructions": 316}, "instructions of the hot loop: 300 before, 316 now"),
        ({"mix": {"mma": 32, "async_copies": 48}}, "wide_loads instructions: 48 before, 0 now"),
    ],
)
def test_a_regression_names_kernel_configuration_architecture_and_both_numbers(
    change: dict[str, object], text: str
) -> None:
    before = {"_decode decode/bf16 sm_90": CODE}
    assert table.regressions(before, before) == []
    (said,) = table.regressions(before, {row: replace(CODE, **change) for row in before})
    assert said == f"_decode decode/bf16 sm_90: {text}"


def test_a_kernel_that_is_gone_is_a_regression_of_the_whole_table_only() -> None:
    before = {"_decode decode/bf16 sm_90": CODE}
    (said,) = table.regressions(before, {})
    assert said == "_decode decode/bf16 sm_90: was compiled before and is not now"
    assert table.regressions(before, {}, whole=False) == []


def test_the_table_survives_its_file(tmp_path: Path) -> None:
    done = Done(Job("decode/bf16", 90, frozenset()), [("_decode", CODE), ("_decode", CODE)])
    rows = table.rows_of([done])
    assert list(rows) == ["_decode decode/bf16 sm_90", "_decode decode/bf16 sm_90 #2"]
    path = tmp_path / "aot.json"
    table.save(rows, path)
    assert table.load(path) == rows
    assert "decode/bf16" in path.with_suffix(".md").read_text()
    path.write_text(path.read_text().replace('"triton": "', '"triton": "0.'))
    assert table.load(path) is None
