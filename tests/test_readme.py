"""README: its snippets run, its commands exist, and the map it shows is the map that is drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(README.read_text()) if name == language]


def tiny_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, max_position_embeddings=256)).eval()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_snippet_runs(number):
    import vattn
    from tests.test_press import Heads

    vattn.hf.register()
    rows = torch.randn(1, 8, 40, 128, dtype=torch.bfloat16)
    query, key, value = (torch.randn(1, heads, 5, 16) for heads in (8, 2, 2))
    cache = vattn.KVCache(vattn.Layout(1, 2, 16, 64, dtype="float32"))
    chats = [cache.open()]
    cache.append(0, key, value, chats)
    names = {
        "torch": torch,
        "vattn": vattn,
        "press": Heads(0.5, seed=0),
        "model": tiny_model(),
        "inputs": {"input_ids": torch.arange(1, 9)[None], "max_new_tokens": 4, "do_sample": False},
        "k": rows,
        "v": rows,
        "query": query,
        "key": key,
        "value": value,
        "cache": cache,
        "chats": chats,
        "layer": 0,
    }
    exec(compile(blocks("python")[number], f"README snippet {number}", "exec"), names)
    cache.close()


def test_the_commands_exist():
    from typer.testing import CliRunner

    from vattn.cli import app

    text = "\n".join(blocks(""))
    named = set(re.findall(r"^vattn (\w+)", text, re.MULTILINE))
    assert named >= {"generate", "map", "plan", "doctor"}
    for name in named:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_the_map_is_the_one_that_is_drawn():
    from typer.testing import CliRunner

    from vattn.cli import app

    drawn = CliRunner().invoke(app, ["map"]).stdout
    lines = [line.rstrip() for line in drawn.strip().splitlines() if "|" in line]
    shown = [block for block in blocks("text") if "sequence 0" in block]
    assert len(shown) == 1
    assert [line.rstrip() for line in shown[0].splitlines() if "|" in line] == lines
