"""The shipped byte-level model, its tokenizer, and the generators of its recall tasks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.model import data, evaluate, tasks
from bench.model.net import ByteLlama, NetConfig

FOLDER = Path(__file__).resolve().parent.parent / "vattn" / "assets" / "model"
BITS_BOUND = 2.2  # the card gives the whole novel's figure; a slice of 8 KB scatters around it


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def novel() -> bytes:
    return data.held_out()


def test_sizes(model: LlamaForCausalLM) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 12e6
    assert 4e6 <= sum(p.numel() for p in model.parameters()) <= 8e6
    config = model.config
    assert config.max_position_embeddings >= 4096
    assert config.num_key_value_heads < config.num_attention_heads
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (256, 0, 0)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    "text", ["Emma Woodhouse, handsome", "  two  spaces\n\ttab ", "é 你好 🙂 Ā \u0000 ĠĊ", ""]
)
def test_tokenizer_is_bytes(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 256


def test_own_network_agrees(model: LlamaForCausalLM, novel: bytes) -> None:
    """The training network and the Hugging Face class give the same logits."""
    net = ByteLlama(NetConfig())
    shipped = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    net.load_state_dict(shipped)
    ids = torch.tensor([list(novel[5000:5300])])
    with torch.no_grad():
        torch.testing.assert_close(net(ids), model(ids).logits, atol=2e-3, rtol=2e-3)


def test_held_out_bits(model: LlamaForCausalLM, novel: bytes) -> None:
    piece = novel[200_000:208_192]
    assert evaluate.bits_per_byte(model, piece, context=1024, stride=512) < BITS_BOUND


def test_bits_per_byte_of_a_uniform_model() -> None:
    """Every byte but the first is scored once, whatever the windows: 8 bits each."""
    seen = []

    def uniform(ids: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return torch.zeros(*ids.shape, 256)

    for length, context, stride in [(1000, 128, 64), (100, 128, 64), (257, 128, 128)]:
        bits = evaluate.bits_per_byte(uniform, bytes(length), context, stride)
        assert bits == pytest.approx(8.0)
    assert seen


def test_short_recall(model: LlamaForCausalLM, novel: bytes) -> None:
    """Only the pass key is dependable; the card gives the weaker lookup."""
    assert evaluate.recall_accuracy(model, 256, 6, seed=3, task="passkey", text=novel) >= 5 / 6


def test_greedy_generation_recalls(model: LlamaForCausalLM, novel: bytes) -> None:
    """Real decoding with a cache, not only the teacher-forced comparison."""
    example = next(tasks.examples("passkey", novel, 256, 1, seed=5))
    ids = torch.tensor([list(example.prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    assert bytes(out[0, ids.shape[1] :].tolist()) == example.answer


@pytest.mark.parametrize("task", tasks.TASKS)
def test_examples_are_seeded(novel: bytes, task: str) -> None:
    first = list(tasks.examples(task, novel, 300, 5, seed=7))
    assert first == list(tasks.examples(task, novel, 300, 5, seed=7))
    assert first != list(tasks.examples(task, novel, 300, 5, seed=8))
    for example in first:
        assert example.answer in example.prompt
        start = example.prompt.rindex(example.answer) + len(example.answer)
        assert len(example.prompt) - start >= 300


def test_unknown_task(novel: bytes) -> None:
    with pytest.raises(ValueError, match="unknown task"):
        next(tasks.examples("sorting", novel, 10, 1, seed=0))


@pytest.mark.parametrize("length", [257, 1025, 4097])
def test_training_sequences(novel: bytes, length: int) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        for make in (tasks.recall_sequence, tasks.copy_sequence):
            got, weights = make(novel[: 2 * length], length, rng)
            assert len(got) == len(weights) == length
            assert max(weights) > 0.0


def test_batches_are_seeded_and_skip_the_held_out_novel() -> None:
    one, two = data.Batches(None, seed=1), data.Batches(None, seed=1)
    for a, b in zip(one.draw(4, 256, 0.3, 0.1), two.draw(4, 256, 0.3, 0.1), strict=True):
        assert torch.equal(a, b)
    assert b"Kellynch" in data.held_out()
    assert b"Kellynch" not in one.novels + one.bible
