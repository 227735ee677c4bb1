"""The command: what it prints, what it exits with, and that its numbers are right."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import complaint, run_json, runner
from vattn.cli import app, parse_bytes
from vattn.policies.names import named
from vattn.report import cat_peak, cat_rows, size, step_peak
from vattn.shape import ModelShape

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "It is a truth universally acknowledged, that a single man"

# Llama 3 8B, bfloat16: a row of K in one layer is 8 heads * 128 * 2 B = 2 KiB, a token 128 KiB.
LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny Llama with random sharpened weights and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(alphabet),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        for weight in llama.parameters():
            if weight.ndim > 1:
                weight *= 3
    llama.save_pretrained(folder)
    return folder


# ---- generate --------------------------------------------------------------------------------
@pytest.mark.parametrize("extra", [(), ("--batch", 3, "--rows", "token_major")], ids=["1", "3"])
def test_tokens_are_those_of_the_stock_cache(model, extra):
    report = run_json(
        *("generate", "--model", model, "--prompt", PROMPT, "--compare"),
        *("--max-new-tokens", 24, "--page-bytes", "4K", *extra),
    )
    batch = extra[1] if extra else 1
    assert report["compare"]["identical"]
    assert report["compare"]["same_tokens"] == report["compare"]["tokens"] == 24 * batch
    memory = report["memory"]
    tokens = report["prompt_tokens"] + 24 - 1
    assert memory["used_bytes"] == batch * tokens * report["model"]["bytes_per_token"]
    assert memory["mapped_bytes"] == memory["pages"] * 4096
    assert memory["reserved_bytes"] >= batch * 512 * report["model"]["bytes_per_token"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_computed_memory_is_what_the_stock_cache_holds(model, cache):
    """The rows marked as computed are checked against the caches they speak of."""
    options = ("--model", model, "--prompt", PROMPT, "--max-new-tokens", 8, "--batch", 2)
    computed = run_json("generate", *options)["computed"]
    measured = run_json("generate", *options, "--cache", cache)["memory"]
    rows = [row for row in computed if row["name"].lower().startswith(cache)]
    row = min(rows, key=lambda row: row["mapped_bytes"])
    for name in ("mapped_bytes", "used_bytes", "copied_bytes"):
        assert measured[name] == row[name], name


def test_peak_of_torch_cat_by_hand():
    """Rows of 8 bytes, two layers, the second with a window of 4; 10 tokens are read."""
    shape = ModelShape("toy", 1, 1, 2, (None, 4), dtype="float32")
    assert cat_rows(shape, 10, 10) == [10, 10]
    assert cat_rows(shape, 10, 11) == [11, 4]
    assert step_peak(shape, 10, 10) == 8 * 40
    # K of layer 0 is new beside 40 old rows, V beside 41: 52. Layer 1: 42 old rows, 2 * 4 new.
    assert step_peak(shape, 10, 11) == 8 * 52
    # Layer 0: 30 old rows, K of 12, then V beside one row more: 43. Layer 1: 32 and 2 * 4.
    assert step_peak(shape, 10, 12) == 8 * 43
    assert cat_peak(shape, 10, 12) == 8 * 52


def test_prompts_of_different_lengths_make_a_padded_batch(model):
    report = run_json(
        *("generate", "--model", model, "--prompt", PROMPT, "--prompt", "Call me", "--compare"),
        *("--max-new-tokens", 6),
    )
    assert report["compare"]["identical"]
    assert len(report["texts"]) == 2


def test_context_repeats_or_cuts_the_prompt(model):
    for context in (7, 150):
        report = run_json(
            *("generate", "--model", model, "--prompt", PROMPT, "--context", context),
            *("--max-new-tokens", 2),
        )
        assert report["prompt_tokens"] == context


def test_sampling_follows_the_seed(model):
    def text(seed: int) -> str:
        options = ("--prompt", PROMPT, "--max-new-tokens", 16, "--temperature", 1.5)
        return run_json("generate", "--model", model, *options, "--seed", seed)["texts"][0]

    assert text(1) == text(1) != text(2)


def test_generate_for_people_streams_text_and_leaves_files(model, tmp_path):
    plot, snapshot = tmp_path / "map.png", tmp_path / "trace.pickle"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    done = runner.invoke(
        app,
        [
            *("generate", "--model", str(model), "--prompt-file", str(prompt), "--compare"),
            *("--max-new-tokens", "20", "--plot", str(plot), "--snapshot", str(snapshot)),
        ],
    )
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "tokens identical to DynamicCache: yes (20/20" in words
    assert "mapped" in words
    assert "* computed from the shapes, not run" in words
    assert PROMPT in done.stdout
    assert plot.stat().st_size > 20_000

    from torch.cuda import _memory_viz

    trace = pickle.loads(snapshot.read_bytes())
    assert any(event["action"] == "segment_map" for event in trace["device_traces"][0])
    assert "total_allocated" in _memory_viz.segsum(trace)


def test_differing_tokens_exit_with_1(model, monkeypatch):
    monkeypatch.setattr("vattn.present.same_tokens", lambda a, b: (3, 4))
    report = run_json(
        *("generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", 4, "--compare"),
        code=1,
    )
    assert not report["compare"]["identical"]


def test_saved_report_can_be_drawn(model, tmp_path):
    report = run_json("generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", 4)
    saved = tmp_path / "report.json"
    saved.write_text(json.dumps(report))
    done = runner.invoke(app, ["map", "--from-json", str(saved)])
    assert done.exit_code == 0, done.output
    assert "sequence 0" in done.stdout
    assert "layers 0-1" in done.stdout


# ---- plan ------------------------------------------------------------------------------------
@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    return path


def test_plan_agrees_with_a_hand_count(config):
    plan = run_json("plan", config, "--tokens", 1366)
    assert plan["model"]["bytes_per_token"] == 128 << 10
    assert plan["model"]["layer_row_bytes"] == 2 << 10
    options = {(o["layout"], o["page_bytes"]): o for o in plan["options"]}

    paged = options["per_layer, token-major", 65536]
    assert paged["tokens_per_page"] == 32
    assert paged["lanes"] == 64  # K and V of 32 layers
    assert paged["expected_waste_bytes"] == 64 * 65536 // 2
    assert paged["waste_share"] == [pytest.approx(43 * 32 / 1366 - 1)]
    assert paged["maps_per_sequence"] == 128
    assert paged["share_calls"] == 64

    heads = options["per_layer, head-major", 4096]
    assert heads["row_bytes"] == 256
    assert heads["lanes"] == 512
    assert heads["tokens_per_page"] == 16

    whole = options["all_layers", 2 << 20]
    assert whole["lanes"] == 1
    assert whole["tokens_per_page"] == 16
    assert whole["share_grain_tokens"] == 16


def test_plan_recommends_a_layout_within_the_goal(config):
    for target in ("host", "cuda"):
        plan = run_json("plan", config, "--target", target)
        best = plan["recommended"]
        assert best in plan["options"]
        assert best["waste_share"][0] <= 0.02
        assert best["layout"] in plan["why"]
    shares = [o["share_calls"] for o in plan["options"] if o["layout"] == "all_layers"]
    assert shares[0] == 32768 // 16  # one cuMemMap for each page of 16 tokens


def test_plan_counts_windows(tmp_path):
    """A layer with a window keeps its window; a group that mixes windows keeps everything."""
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "model_type": "gpt_oss",
                "num_hidden_layers": 4,
                "hidden_size": 2880,
                "head_dim": 64,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "max_position_embeddings": 4096,
            }
        )
    )
    plan = run_json("plan", path, "--tokens", 4096)
    row = 8 * 64 * 2
    assert plan["used_bytes"] == [2 * row * 2 * (128 + 4096)]
    shares = {(o["layout"], o["page_bytes"]): o["waste_share"][0] for o in plan["options"]}
    assert shares["per_layer, token-major", 4096] == 0.0  # 4 tokens a page: all ends meet
    assert shares["all_layers", 4096] == pytest.approx(2 * 4096 / (128 + 4096) - 1)


def test_plan_for_people_says_what_and_why(config):
    done = runner.invoke(app, ["plan", str(config.parent)])
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "recommended: per_layer, head-major, pages of 8.0 KiB" in words
    assert "half a page in each of 512 lanes" in words


# ---- doctor and map --------------------------------------------------------------------------
def test_doctor_tries_the_host_backend():
    report = run_json("doctor")
    assert report["healthy"]
    works = {probe["name"]: probe["works"] for probe in report["probes"]}
    assert works["map and alias"]
    assert works["reserve 1 TiB"]
    assert {choice["what"] for choice in report["choices"]} >= {"backend", "page size", "attention"}
    assert report["packages"]["torch"]["state"] == "good"


def test_doctor_for_people():
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "vm.max_map_count" in done.stdout
    assert "healthy" in done.stdout


def test_doctor_prints_a_flight_record(tmp_path):
    from vattn.allocator.flight import FlightRecorder

    flights = FlightRecorder()
    flights.note("map", 0x7F0000200000, 5, 2, 0)
    flights.note("release", 0x7F0000000000, None, 8, 3)
    flights.save(tmp_path / "flights")
    assert FlightRecorder.load(tmp_path / "flights") == list(flights)
    done = runner.invoke(app, ["doctor", "--trace", str(tmp_path / "flights")])
    assert done.exit_code == 0
    assert "0x7f0000200000" in done.stdout
    (tmp_path / "flights").write_text("{}")
    done = runner.invoke(app, ["doctor", "--trace", str(tmp_path / "flights")])
    assert done.exit_code == 2
    assert "FlightRecorder.save" in done.stderr


def test_doctor_exits_with_1_where_nothing_can_be_mapped(monkeypatch):
    from vattn.probe import Probe

    monkeypatch.setattr(
        "vattn.doctor.host_probes", lambda: [Probe("map and alias", False, "failed", "why")]
    )
    assert not run_json("doctor", code=1)["healthy"]


def test_map_draws_a_life(tmp_path):
    saved = run_json("map", "--plot", tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 20_000
    kinds = {kind for band in saved["bands"] for kind, _ in band["runs"]}
    assert {"used", "shared", "retained"} <= kinds
    done = runner.invoke(app, ["map", "--rows", "token_major", "--page-bytes", "16K"])
    assert done.exit_code == 0
    assert "one character: page of 16.0 KiB" in done.stdout


# ---- what bad input gets ---------------------------------------------------------------------
def test_missing_model_names_path_and_remedy(tmp_path):
    text = complaint("generate", "--model", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in text
    assert "--model DIR" in text


def test_empty_model_directory_is_no_model(tmp_path):
    assert "config.json" in complaint("generate", "--model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_3_8B, "num_hidden_layers": 1}))
    assert str(tmp_path) in complaint("generate", "--model", tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cache", "paged"), "vattn, dynamic, static"),
        (("--attn", "flash"), "vattn, sdpa, eager"),
        (("--batch", 0), "at least 1"),
        (("--max-new-tokens", 0), "at least 1"),
        (("--batch", 1, "--prompt", "another"), "leaves out"),
        (("--context", 0), "at least 1"),
        (("--temperature", -1), "negative"),
        (("--page-bytes", "big"), "64K"),
        (("--page-bytes", "5000"), "multiple of 4096"),
        (("--rows", "diagonal"), "head_major"),
        (("--cache", "static", "--plot", "x.png"), "--cache vattn"),
        (("--plot", "/no/such/folder/x.png"), "/no/such/folder"),
        (("--prompt-file", "/no/such/prompt"), "/no/such/prompt"),
        (("--budget", "10%"), "name a selector"),
        (("--select", "quest", "--budget", "many"), "such as 25%"),
        (("--select", "quest", "--budget", "0%"), "such as 25%"),
        (("--select", "quest", "--budget", "32"), "budget_tokens"),
        (("--select", "oracle"), "two-stage"),
        (("--select", "quest", "--attn", "sdpa"), "--attn vattn"),
        (("--select", "quest", "--cache", "dynamic"), "--cache vattn"),
        (("--host-tier", "4M", "--cache", "static"), "--cache vattn"),
    ],
)
def test_bad_options_are_named(model, options, words):
    prompt = () if "--prompt-file" in options else ("--prompt", PROMPT)
    assert words in complaint("generate", "--model", model, *prompt, *options)


@pytest.mark.parametrize("name", sorted(named()))
def test_every_selector_generates(model, name):
    options = ["--prompt", PROMPT, "--context", "360", "--max-new-tokens", "3", "--select", name]
    report = run_json("generate", "--model", model, *options, "--budget", 192)
    shares = [layer["read"] / layer["there"] for layer in report["activity"]]
    assert all(0.1 < share < 0.95 for share in shares), shares


def test_a_selection_over_tiers_is_drawn(model, tmp_path):
    picture = tmp_path / "read.png"
    options = ["--prompt", PROMPT, "--context", "480", "--max-new-tokens", "12"]
    options += ["--select", "quest", "--budget", "25%", "--host-tier", "96K"]
    done = runner.invoke(app, ["generate", "--model", str(model), *options, "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    assert "decode steps read 2" in done.stdout
    assert "came back" in done.stdout
    assert picture.stat().st_size > 20_000


def test_exhausted_budget_says_what_was_needed(model):
    options = ["--prompt", PROMPT, "--memory", "4K"]
    done = runner.invoke(app, ["generate", "--model", str(model), *options])
    assert done.exit_code == 2
    assert "OutOfPages: out of pages: needed" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_bad_plans_are_named(tmp_path, config):
    assert str(tmp_path / "no.json") in complaint("plan", tmp_path / "no.json")
    assert "host or cuda" in complaint("plan", config, "--target", "abacus")
    assert "1..100" in complaint("plan", config, "--tokens", 200, "--max-tokens", 100)
    (tmp_path / "latent.json").write_text(json.dumps({**LLAMA_3_8B, "kv_lora_rank": 512}))
    assert "kv_lora_rank" in complaint("plan", tmp_path / "latent.json")
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json" in complaint("plan", tmp_path / "broken.json")


def test_bad_saved_map_is_named(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    assert "not a memory map" in complaint("map", "--from-json", tmp_path / "other.json")


def test_sizes_are_read_and_written():
    assert [parse_bytes(text, "") for text in ("65536", "64K", "64KiB", "2mb", "1.5G")] == [
        65536,
        65536,
        65536,
        2 << 20,
        3 << 29,
    ]
    assert [size(n) for n in (0, 1023, 1536, 2 << 20)] == ["0 B", "1023 B", "1.5 KiB", "2.0 MiB"]


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys, vattn.cli; print(*(sys.modules.keys() & {'torch', 'transformers', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    done = subprocess.run(
        [sys.executable, "-m", "vattn", "--help"], capture_output=True, text=True, check=True
    )
    assert "generate" in done.stdout
