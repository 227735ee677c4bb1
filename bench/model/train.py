"""Train the small byte-level model: ``python -m bench.model.train --out DIR --minutes 120``.

The schedule follows the time spent in training steps, so a suspended or interrupted run goes on
where it was (``--resume``). Text and synthetic recall are mixed; contexts grow from 256 to 4096.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench.model import evaluate, tasks
from bench.model.data import Batches, held_out
from bench.model.export import export
from bench.model.guide import guidance
from bench.model.muon import Muon
from bench.model.net import ByteLlama, NetConfig

# (from this share of the run on, {context in bytes: share of the steps})
CONTEXTS: tuple[tuple[float, dict[int, float]], ...] = (
    (0.00, {256: 1.0}),
    (0.40, {256: 0.5, 512: 0.3, 1024: 0.2}),
    (0.60, {512: 0.4, 1024: 0.35, 2048: 0.25}),
    # To recall over a distance takes a context that is longer.
    (0.70, {1024: 0.2, 3072: 0.6, 4096: 0.2}),
)
# A step never counts for more than this many seconds: a suspended process does not use up
# its schedule.
LONGEST_STEP_S = 12.0


@dataclass
class Progression:
    """What a checkpoint restores besides the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict] = field(default_factory=list)


def rate(share: float, warmup: float = 0.01, hold: float = 0.5) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero; share in 0..1."""
    if share < warmup:
        return share / warmup
    return 1.0 if share < hold else max(0.0, (1.0 - share) / (1.0 - hold))


def pick_context(share: float, rng: random.Random) -> int:
    """The context of the next step, drawn from the stage that ``share`` falls in."""
    mix = next(m for start, m in reversed(CONTEXTS) if share >= start)
    return rng.choices(list(mix), weights=list(mix.values()))[0]


class Trainer:
    """The model, its two optimisers and the data, with checkpoints."""

    def __init__(self, args: argparse.Namespace, rank: int = 0) -> None:
        self.rank = rank
        torch.manual_seed(args.seed)
        self.args = args
        self.config = NetConfig()
        self.net = ByteLlama(self.config, compiled=not args.eager)
        lookups, matrices, rest = [], [], []
        for name, p in self.net.named_parameters():
            if p.dim() != 2 or "embed" in name:
                rest.append(p)
            else:
                (lookups if "q_proj" in name or "k_proj" in name else matrices).append(p)
        # Sharp attention needs large queries and keys: they may learn at a higher rate.
        self.muon = Muon(
            [
                {"params": matrices, "boost": 1.0},
                {"params": lookups, "boost": args.boost},
            ],
            lr=args.lr,
            decay=args.decay,
        )
        self.adam = torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.data = Batches(args.texts, args.seed, args.novel_share)
        self.state = Progression()
        self.novel = held_out(args.texts)
        self.losses: list[float] = []
        self.guide_loss = 0.0

    @property
    def share(self) -> float:
        """Part of the run that is done, 0..1."""
        return min(1.0, self.state.seconds / (60.0 * self.args.minutes))

    def finished(self) -> bool:
        """Whether the budget is spent, as the first worker sees it."""
        over = torch.tensor([float(self.share >= 1.0)])
        if self.args.workers > 1:
            dist.broadcast(over, 0)
        return bool(over.item())

    def step(self) -> float:
        """One optimiser step; returns the mean weighted loss in nats per byte."""
        began = time.perf_counter()
        # The first worker's clock decides, so that all follow one schedule.
        clock = torch.tensor([self.state.seconds], dtype=torch.float64)
        if self.args.workers > 1:
            dist.broadcast(clock, 0)
        self.state.seconds = clock.item()
        factor = rate(self.share)
        for group in self.muon.param_groups:
            group["lr"] = self.args.lr * factor * group["boost"]
            group["momentum"] = 0.85 + 0.10 * min(1.0, self.state.step / 200)
        for group in self.adam.param_groups:
            group["lr"] = self.args.adam_lr * factor
        rng = random.Random(f"{self.args.seed}/{self.state.step}")
        context = self.args.context or pick_context(self.share, rng)
        rows = max(1, self.args.step_tokens // self.args.workers // context)
        x, y, w = self.data.at(self.rank, self.state.step).draw(
            rows,
            context,
            self.args.recall,
            self.args.copying,
        )
        guided = self.args.guide > 0 and context <= 2048
        taps: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        logits = self.net(x, taps if guided else None)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        loss = (losses * w.flatten()).mean()
        whole = loss
        if guided:
            extra = guidance(x, taps)
            self.guide_loss = extra.item()
            whole = loss + self.args.guide * extra
        whole.backward()
        self._average_gradients()
        self.muon.step()
        self.adam.step()
        self.net.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.tokens += x.numel() * self.args.workers
        spent = time.perf_counter() - began
        # The first steps compile; that is not training time either.
        self.state.seconds += min(spent, LONGEST_STEP_S)
        return loss.item()

    def _average_gradients(self) -> None:
        """One all-reduce of all gradients over the workers."""
        if self.args.workers == 1:
            return
        grads = [p.grad for p in self.net.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.args.workers
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def measure(self) -> dict:
        """One record of the curve: a quick held-out estimate and recall by distance."""
        middle = len(self.novel) // 2
        piece = self.novel[middle : middle + 49_152]
        # Positions that were never trained say nothing about the text.
        window = max(c for start, m in CONTEXTS if self.share >= start for c in m)
        window = min(window, 1024)
        record = {
            "step": self.state.step,
            "tokens": self.state.tokens,
            "minutes": round(self.state.seconds / 60, 2),
            "budget": self.args.minutes,
            "lr": round(self.args.lr * rate(self.share), 5),
            "step_tokens": self.args.step_tokens,
            "boost": self.args.boost,
            "guide": self.args.guide,
            "recall_share": self.args.recall,
            "copy_share": self.args.copying,
            "train_loss": round(sum(self.losses) / max(1, len(self.losses)), 4),
            "context": window,
            "held_out_bits": round(evaluate.bits_per_byte(self.net, piece, window, window // 2), 4),
        }
        longest = 4096 if self.share > 0.95 else 1024
        for task in tasks.TASKS:
            record[task] = {
                str(d): evaluate.recall_accuracy(self.net, d, self.args.samples, 0, task, piece)
                for d in (128, *evaluate.DISTANCES)
                if d <= longest
            }
        self.losses.clear()
        return record

    def save(self) -> None:
        """Write the checkpoint, the exported model and the curve, each atomically."""
        out: Path = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        blob = {
            "net": self.net.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "state": asdict(self.state),
        }
        torch.save(blob, out / "checkpoint.partial")
        os.replace(out / "checkpoint.partial", out / "checkpoint.pt")
        target: Path = self.args.export or out / "model"
        export(self.net.state_dict(), self.config, target)
        lines = "".join(json.dumps(r) + "\n" for r in self.state.curve)
        (target / "curve.partial").write_text(lines)
        os.replace(target / "curve.partial", target / "curve.jsonl")

    def restore(self) -> None:
        """Go on from the checkpoint in ``--out``."""
        blob = torch.load(self.args.out / "checkpoint.pt", weights_only=False)
        self.net.load_state_dict(blob["net"])
        if len(blob["muon"]["param_groups"]) == len(self.muon.param_groups):
            self.muon.load_state_dict(blob["muon"])
            self.muon.param_groups[1]["boost"] = self.args.boost
        self.adam.load_state_dict(blob["adam"])
        self.state = Progression(**blob["state"])


def run(trainer: Trainer, console: Console) -> None:
    """Steps until the budget is spent, with a measurement every ``--every`` minutes."""
    state, args = trainer.state, trainer.args
    due = state.seconds + 60 * args.every
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    shown = console.is_terminal and trainer.rank == 0
    with Progress(*columns, console=console, disable=not shown) as bar:
        row = bar.add_task("training", total=60 * args.minutes)
        while not trainer.finished():
            trainer.losses.append(trainer.step())
            if trainer.rank:
                continue
            recent = trainer.losses[-20:]
            note = (
                f"step {state.step} {state.seconds / 60:.1f} min "
                f"loss {sum(recent) / len(recent):.3f} guide {trainer.guide_loss:.2f}"
            )
            bar.update(row, completed=state.seconds, description=note)
            if not console.is_terminal and state.step % 20 == 0:
                console.print(note)
            if state.seconds >= due or trainer.share >= 1.0:
                torch.set_num_threads(max(torch.get_num_threads(), args.workers))
                record = trainer.measure()
                torch.set_num_threads(1 if args.workers > 1 else torch.get_num_threads())
                state.curve.append(record)
                trainer.save()
                console.print(json.dumps(record), soft_wrap=True)
                due = state.seconds + 60 * args.every


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--texts", type=Path, default=None, help="folder of the .txt.xz files")
    p.add_argument("--out", type=Path, required=True, help="checkpoint and exported model")
    p.add_argument("--export", type=Path, default=None, help="model folder (OUT/model)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--minutes", type=float, default=120.0, help="time in training steps")
    p.add_argument("--every", type=float, default=6.0, help="minutes between measurements")
    p.add_argument("--samples", type=int, default=8, help="recall prompts per measurement")
    p.add_argument("--step-tokens", type=int, default=4096, help="bytes per optimiser step")
    p.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    p.add_argument("--threads", type=int, default=0, help="of a single worker; 0: all cores")
    p.add_argument("--lr", type=float, default=0.018, help="Muon, matrices")
    p.add_argument("--adam-lr", type=float, default=0.004, help="AdamW, embedding and norms")
    p.add_argument("--guide", type=float, default=0.3, help="weight of attention guidance")
    p.add_argument("--boost", type=float, default=2.0, help="rate factor of query and key")
    p.add_argument("--context", type=int, default=0, help="one context instead of the stages")
    p.add_argument("--decay", type=float, default=0.05, help="weight decay of the matrices")
    p.add_argument("--recall", type=float, default=0.4, help="share of recall sequences")
    p.add_argument("--copying", type=float, default=0.15, help="share of copy sequences")
    p.add_argument("--novel-share", type=float, default=0.8, help="novels against the Bible")
    p.add_argument("--eager", action="store_true", help="do not compile")
    p.add_argument("--resume", action="store_true")
    return p.parse_args(argv)


def work(rank: int, args: argparse.Namespace) -> None:
    """One worker process: joins the others, trains; the first one also measures and saves."""
    if args.workers > 1:
        store = dist.FileStore(str(args.out / f"rendezvous.{os.getppid()}"), args.workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
        torch.set_num_threads(1)
    elif args.threads:
        torch.set_num_threads(args.threads)
    trainer = Trainer(args, rank)
    if args.resume:
        trainer.restore()
    console = Console()
    if rank == 0:
        console.print(f"{sum(p.numel() for p in trainer.net.parameters())} parameters")
    run(trainer, console)
    if args.workers > 1:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Train, or go on training, and leave a model directory."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.workers > 1:
        mp.spawn(work, args=(args,), nprocs=args.workers)
    else:
        work(0, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
