"""Write a Hugging Face model directory: weights in bfloat16, config and byte tokenizer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from bench.model.net import NetConfig, write_config


def byte_alphabet() -> list[str]:
    """The printable character by which ByteLevel tokenizers write each byte value 0..255.

    This is the published byte-to-unicode table of GPT-2: printable Latin-1 bytes stand for
    themselves, the others follow from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    table, extra = [], 0
    for value in range(256):
        if value in printable:
            table.append(chr(value))
        else:
            table.append(chr(256 + extra))
            extra += 1
    return table


def byte_tokenizer() -> Tokenizer:
    """256 entries, id equal to byte value, no merges, no added or special tokens.

    A special token would be matched in ordinary text and break the lossless round trip, so
    byte 0 is named as separator in ``config.json`` only.
    """
    vocab = {char: value for value, char in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_tokenizer(folder: Path, context: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def export(state: dict[str, Tensor], config: NetConfig, folder: Path) -> None:
    """Write the model directory; the weights appear under their name only when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in state.items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, str(partial), metadata={"format": "pt"})
    write_config(config, folder)
    write_tokenizer(folder, config.context)
    os.replace(partial, folder / "model.safetensors")
