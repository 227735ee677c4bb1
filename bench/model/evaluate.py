"""Held-out bits per byte and recall accuracy of a byte-level causal model.

``python -m bench.model.evaluate --model DIR --json`` prints one JSON line per figure.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.model import tasks
from bench.model.data import held_out

DISTANCES = (256, 512, 1024, 2048, 4096)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits [batch, length, vocab] of a Hugging Face model or of a plain callable."""
    out = model(ids)
    return getattr(out, "logits", out)


@torch.no_grad()
def bits_per_byte(
    model: Any, text_bytes: bytes, context: int = 2048, stride: int = 1024, batch: int = 4
) -> float:
    """Mean code length of ``text_bytes`` in bits per byte.

    Windows of ``context`` bytes start every ``stride`` bytes; a window scores only the bytes
    that no earlier window scored, so all but the first have ``context - stride`` bytes before
    them. The first byte of the text has no context and is not counted.
    """
    ids = torch.frombuffer(bytearray(text_bytes), dtype=torch.uint8).long()
    total, count, scored = 0.0, 0, 1
    spans: list[tuple[int, int, int]] = []
    for start in range(0, max(1, len(ids) - 1), stride):
        end = min(start + context, len(ids))
        spans.append((start, end, scored))
        scored = end
        if end == len(ids):
            break
    full = [s for s in spans if s[1] - s[0] == context]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)]
    groups += [[s] for s in spans if s[1] - s[0] != context]
    for group in groups:
        rows = torch.stack([ids[a:b] for a, b, _ in group])
        logits = logits_of(model, rows[:, :-1]).float()
        losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        for row, (start, _, first) in zip(losses, group, strict=True):
            part = row[first - start - 1 :]
            total, count = total + part.sum().item(), count + part.numel()
    return total / count / math.log(2)


@torch.no_grad()
def recall_accuracy(
    model: Any,
    distance: int,
    n: int,
    seed: int = 0,
    task: str = "passkey",
    text: bytes | None = None,
) -> float:
    """Share of ``n`` prompts whose whole answer greedy decoding gives, at a distance in bytes.

    The answer is fed to the model and every digit's arg-max compared: greedy decoding gives
    the answer exactly when all of them agree, and one forward pass is enough.
    """
    filler = held_out() if text is None else text
    right = 0
    for example in tasks.examples(task, filler, distance, n, seed):
        whole = example.prompt + example.answer
        ids = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()[None]
        picks = logits_of(model, ids[:, :-1])[0, len(example.prompt) - 1 :].argmax(-1)
        right += bytes(picks.tolist()) == example.answer
    return right / n


def _emit(record: dict, as_json: bool) -> None:
    text = json.dumps(record) if as_json else "  ".join(f"{k}={v}" for k, v in record.items())
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line: evaluate a model directory on the held-out novel and on recall."""
    parser = argparse.ArgumentParser(description="evaluate a byte-level model directory")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, default=None, help="folder of the .txt.xz files")
    parser.add_argument("--bytes", type=int, default=0, help="bytes of the novel, 0 for all")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=50, help="prompts per task and distance")
    parser.add_argument("--distances", type=int, nargs="*", default=list(DISTANCES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)

    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    novel = held_out(args.texts)
    text = novel[: args.bytes] if args.bytes else novel
    bits = bits_per_byte(model, text, args.context, args.stride)
    _emit(
        {
            "metric": "bits_per_byte",
            "value": round(bits, 4),
            "bytes": len(text),
            "context": args.context,
            "stride": args.stride,
        },
        args.json,
    )
    for task in tasks.TASKS:
        for distance in args.distances:
            value = recall_accuracy(model, distance, args.samples, args.seed, task, novel)
            _emit(
                {
                    "metric": "recall",
                    "task": task,
                    "distance": distance,
                    "value": value,
                    "n": args.samples,
                    "seed": args.seed,
                },
                args.json,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
