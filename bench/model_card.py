"""The shipped model: bits per byte on a novel it never saw, and recall by distance.

Bits per byte: the held-out novel in windows of 2,048 bytes, each scored behind 1,024 bytes of
context. Recall: the share of prompts whose whole answer greedy decoding gives, when it lies so many
bytes back. ``--quick`` takes the beginning of the novel and few prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

import vattn
from bench.harness import Bench

SHIPPED = Path(vattn.__file__).parent / "assets" / "model"
BITS_TARGET, RECALL_TARGET = "<= 2.0", ">= 0.95"
TARGET_DISTANCE = 2048
VOCAB = 256
MOST_BYTES = 12_000_000  # of the shipped file
CHECKED = 192  # bytes decoded one by one through our cache


def run(
    bench: Bench,
    model: Annotated[Path, typer.Option(help="Model directory.")] = SHIPPED,
    samples: Annotated[int, typer.Option(help="Prompts a task and distance.")] = 50,
    distance: Annotated[list[int], typer.Option(help="Bytes back.")] = [256, 1024, 2048, 4096],
) -> None:
    if bench.peer("transformers") is None:
        return bench.skip("transformers is not installed")
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from bench.model import tasks
    from bench.model.data import held_out
    from bench.model.evaluate import bits_per_byte, recall_accuracy

    disable_progress_bar()
    net = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    novel = held_out()
    text = novel[: bench.pick(len(novel), 12 << 10)]
    gate = partial(sound, net, model, text)
    bench.figure(
        "model_card/bits_per_byte",
        partial(bits_per_byte, net, text),
        "bits/byte",
        gate=gate,
        target=BITS_TARGET,
        bytes_scored=len(text) - 1,
        parameters=sum(weights.numel() for weights in net.parameters()),
    )
    samples = bench.pick(samples, 4)
    for task in tasks.TASKS:
        for back in bench.pick(distance, [TARGET_DISTANCE]):
            bench.figure(
                f"model_card/{task}/{back}",
                partial(recall_accuracy, net, back, samples, bench.seed + 1, task, novel),
                "recall",
                gate=partial(scores, task, novel),
                target=RECALL_TARGET if back == TARGET_DISTANCE else None,
                prompts=samples,
            )
    return None


def sound(net: Any, model: Path, text: bytes) -> bool:
    """The evaluation is calibrated, the file small enough, and the same model decoding through
    `VattnCache`, byte by byte, gives the same code length."""
    from bench.model.evaluate import bits_per_byte

    uniform, knowing = bits_per_byte(even, text[:4096]), bits_per_byte(seer(text[:512]), text[:512])
    assert abs(uniform - 8) < 1e-4, f"{uniform} bits a byte of a model that knows nothing"
    assert knowing < 1e-3, f"{knowing} bits a byte of a model that knows everything"
    size = (model / "model.safetensors").stat().st_size
    assert size <= MOST_BYTES, f"model.safetensors has {size} bytes, more than {MOST_BYTES}"
    some = text[:CHECKED]
    whole, stepwise = bits_per_byte(net, some), decoded_bits(net, some)
    assert abs(whole - stepwise) < 1e-3, f"{whole} bits a byte at once, {stepwise} byte by byte"
    return True


@torch.no_grad()
def decoded_bits(net: Any, text: bytes, **options: Any) -> float:
    """Bits per byte of a text that is fed byte by byte through our cache."""
    from vattn.hf import VattnCache

    cache = VattnCache(net.config, max_tokens=len(text), **options)
    total = torch.zeros((), dtype=torch.float64)
    for byte, after in pairwise(text):
        logits = net(torch.tensor([[byte]]), past_key_values=cache, use_cache=True).logits[0, -1]
        total -= F.log_softmax(logits.double(), -1)[after]
    return float(total) / (len(text) - 1) / torch.log(torch.tensor(2.0)).item()


def scores(task: str, novel: bytes) -> bool:
    """A model that knows nothing recalls nothing; one that knows the answers recalls them all."""
    from bench.model import tasks
    from bench.model.evaluate import recall_accuracy

    assert recall_accuracy(even, 256, 3, 1, task, novel) == 0, "recall of an even guess"
    (first,) = tasks.examples(task, novel, 256, 1, 1)
    knowing = seer(first.prompt + first.answer)
    assert recall_accuracy(knowing, 256, 1, 1, task, novel) == 1, "recall of the right answer"
    return True


def even(ids: torch.Tensor) -> torch.Tensor:
    """A model that holds every byte for equally likely."""
    return torch.zeros(*ids.shape, VOCAB)


def seer(text: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    """A model that knows one text by heart, and names the next byte at every place of it."""
    known = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def model(ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        assert torch.equal(ids[0], known[:length]), "another text than the one known"
        return 40.0 * F.one_hot(known[1 : length + 1], VOCAB)[None]

    return model
