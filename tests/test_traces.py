"""The rules of the trace formats, on made-up rows and on the samples in the repository."""

from __future__ import annotations

import hashlib
import lzma
import re
from itertools import pairwise

import pytest

from bench import workload
from bench.replay import Replay, peak_sequences
from bench.workload import Request, TraceError, azure, load, mooncake, prefix_hits
from vattn import Layout
from vattn.allocator.errors import OutOfPages

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROW = '{"timestamp": 1500, "input_length": 600, "output_length": 7, "hash_ids": [4, 9]}'


def test_azure_times_have_seven_decimals():
    rows = [HEADER, "2023-11-16 18:15:59.9999999,374,44", "2023-11-16 18:16:00.0000001,5,6"]
    first, second = azure(rows)
    assert first == Request(0.0, 374, 44)
    assert second.at == pytest.approx(2e-7, abs=1e-12)


def test_azure_requests_share_nothing():
    assert not any(request.blocks for request in load("azure_conv") + load("azure_code"))
    assert not any(prefix_hits(load("azure_code")))


def test_mooncake_times_are_milliseconds_and_blocks_are_512_tokens():
    (request,) = mooncake([ROW, ""])
    assert request == Request(1.5, 600, 7, (4, 9), 512)


def test_hash_ids_are_chains():
    """A hit counts up to the first unknown block, and no further than the input is long."""

    def request(tokens: int, *blocks: int) -> Request:
        return Request(0.0, tokens, 1, blocks, 512)

    requests = [
        request(1536, 1, 2, 3),
        request(2048, 1, 2, 7, 3),  # 3 is known, but behind an unknown block
        request(1100, 1, 2, 3),  # the last block is not full
    ]
    assert prefix_hits(requests) == [0, 1024, 1100]


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (azure, "2023-11-16 18:15:46,1"),
        (azure, "yesterday,1,2"),
        (azure, "2023-11-16 18:15:46.5,-1,2"),
        (mooncake, "{}"),
        (mooncake, ROW.replace("600", "6000")),
        (mooncake, "not json"),
    ],
)
def test_malformed_rows_are_named(read, row):
    with pytest.raises(TraceError):
        list(read([HEADER, row] if read is azure else [row]))


def test_requests_come_in_order_from_plain_and_compressed_files(tmp_path):
    late, early = ROW.replace("1500", "2500"), ROW
    with lzma.open(tmp_path / "conversation_trace.jsonl.xz", "wt") as file:
        file.write(late + "\n" + early + "\n")
    requests = load("mooncake_conversation", tmp_path)
    assert [request.at for request in requests] == [0.0, 1.0]
    with pytest.raises(TraceError, match="AzureLLM"):
        load("azure_conv", tmp_path)
    with pytest.raises(TraceError, match="there are azure_conv"):
        load("burst")


def test_samples_are_those_of_the_readme():
    readme = (workload.SAMPLES / "README.md").read_text()
    files = sorted(path for path in workload.SAMPLES.iterdir() if path.suffix in (".csv", ".jsonl"))
    assert len(files) == len(workload.TRACES)
    for path in files:
        row = re.search(rf"`{re.escape(path.name)}` \| ([\d,]+) \| `(\w+)`", readme)
        assert row is not None
        data = path.read_bytes()
        assert len(data) == int(row[1].replace(",", ""))
        assert hashlib.sha256(data).hexdigest() == row[2]
    assert {path.name for path in (workload.SAMPLES / "licenses").iterdir()} == {
        "azure-CC-BY-4.0.txt",
        "mooncake-Apache-2.0.txt",
    }


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("azure_conv", 500, Request(0.0, 374, 44)),
        ("azure_code", 500, Request(0.0, 4808, 10)),
        ("mooncake_conversation", 200, Request(0.0, 6758, 500, tuple(range(14)), 512)),
    ],
)
def test_samples(name, count, first):
    requests = load(name)
    assert len(requests) == count
    assert requests[0] == first
    assert all(a.at <= b.at for a, b in pairwise(requests))


# ---- replay --------------------------------------------------------------------------------------
LAYOUT = Layout(1, 1, 64, 64, page_bytes=4096)  # 32 tokens a page, 2 lanes


def test_a_replay_counts_what_a_pencil_counts():
    """Two requests, of which one is open for 40 + 10 steps, the other 40 + 20 from step 20 on."""
    requests = [Request(0.0, 30, 10), Request(0.5, 10, 20)]
    assert peak_sequences(requests) == 2
    totals = Replay(LAYOUT, requests).run()
    assert totals.samples == 8  # steps 0, 10 .. 70
    token = LAYOUT.bytes_per_token
    lengths = [[30], [30], [30, 10], [30, 10], [31, 10], [10], [11], [21]]
    assert totals.used == token * sum(map(sum, lengths))
    pages = [-(-tokens // 32) for now in lengths for tokens in now]
    assert totals.used + totals.wasted == sum(pages) * 2 * LAYOUT.page
    assert totals.peak_sequences == 2
    assert totals.peak_used == (40 + 10) * token
    assert totals.reserved == sum(len(now) for now in lengths) * LAYOUT.max_tokens * token


def test_a_budget_below_the_need_is_refused():
    requests = [Request(0.0, 30, 10), Request(0.0, 10, 20)]
    need = Replay(LAYOUT, requests).run().peak_needed
    Replay(LAYOUT, requests, budget_bytes=need).run()
    with pytest.raises(OutOfPages):
        Replay(LAYOUT, requests, budget_bytes=need - LAYOUT.page).run()


def test_traces_are_found_in_any_folder_below(tmp_path):
    folder = tmp_path / "azure"
    folder.mkdir()
    (folder / "AzureLLMInferenceTrace_code.csv").write_text(f"{HEADER}\n2023-11-16 18:15:46,3,4\n")
    assert load("azure_code", tmp_path) == [Request(0.0, 3, 4)]
