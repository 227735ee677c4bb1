"""Synthetic recall over real text: a pass key, and a table of named numbers.

Every generator takes a ``random.Random`` (or a seed), so an equal seed gives equal bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = (
    "Elinor",
    "Marianne",
    "Edward",
    "Willoughby",
    "Brandon",
    "Lucy",
    "Fanny",
    "Margaret",
    "Anne",
    "Frederick",
    "Walter",
    "Mary",
    "Charles",
    "Louisa",
    "Emma",
    "Harriet",
    "Knightley",
    "Weston",
    "Elton",
    "Churchill",
    "Jane",
    "Bingley",
    "Darcy",
    "Lydia",
    "Wickham",
    "Collins",
    "Charlotte",
    "Kitty",
    "Gardiner",
    "Edmund",
    "Julia",
    "Maria",
    "Crawford",
    "Norris",
    "Rushworth",
    "Catherine",
    "Tilney",
    "Isabella",
    "Thorpe",
    "Eleanor",
    "Moses",
    "Aaron",
    "Joshua",
    "Samuel",
    "David",
    "Solomon",
    "Elijah",
    "Isaiah",
    "Daniel",
    "Esther",
    "Ruth",
    "Abraham",
    "Isaac",
    "Jacob",
    "Joseph",
    "Benjamin",
    "Matthew",
    "Mark",
    "Luke",
    "John",
    "Peter",
    "Paul",
    "Simon",
    "Thomas",
)
PASS_DIGITS = 5
NUMBER_DIGITS = 4
TASKS = ("passkey", "lookup")
TABLE_SIZE = 4  # named numbers in one evaluation prompt


@dataclass(frozen=True)
class Example:
    """A prompt that ends where the answer starts, and the answer; both are bytes."""

    prompt: bytes
    answer: bytes


def digits(rng: random.Random, count: int) -> str:
    """A decimal string of ``count`` digits that does not start with zero."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def passkey_statement(value: str) -> str:
    """The sentence that plants the pass key."""
    return f"\nThe pass key is {value}. Remember it. {value} is the pass key.\n"


def passkey_query() -> str:
    """The question, up to the first digit of the answer."""
    return "\nWhat is the pass key? The pass key is "


def lookup_statement(name: str, value: str) -> str:
    """The sentence that plants one named number."""
    return f"\nThe number of {name} is {value}.\n"


def lookup_query(name: str) -> str:
    """The question, up to the first digit of the answer."""
    return f"\nWhat is the number of {name}? The number of {name} is "


def _filler(text: bytes, length: int, rng: random.Random) -> bytes:
    """A random excerpt of ``length`` bytes."""
    start = rng.randrange(0, max(1, len(text) - length))
    return text[start : start + length]


def passkey_example(text: bytes, distance: int, rng: random.Random) -> Example:
    """``distance`` bytes of text lie between the planted sentence and the question."""
    value = digits(rng, PASS_DIGITS)
    lead = _filler(text, 64, rng)
    middle = _filler(text, distance, rng)
    prompt = lead + passkey_statement(value).encode() + middle + passkey_query().encode()
    return Example(prompt, value.encode())


def lookup_example(
    text: bytes, distance: int, rng: random.Random, pairs: int = TABLE_SIZE
) -> Example:
    """A table of ``pairs`` named numbers, ``distance`` bytes of text, then one of them is asked."""
    names = rng.sample(NAMES, pairs)
    values = [digits(rng, NUMBER_DIGITS) for _ in names]
    table = "".join(lookup_statement(n, v) for n, v in zip(names, values, strict=True))
    wanted = rng.randrange(pairs)
    prompt = _filler(text, 64, rng) + table.encode() + _filler(text, distance, rng)
    return Example(prompt + lookup_query(names[wanted]).encode(), values[wanted].encode())


def examples(task: str, text: bytes, distance: int, count: int, seed: int) -> Iterator[Example]:
    """``count`` seeded examples of one of ``TASKS`` at a distance in bytes."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {TASKS}")
    make = passkey_example if task == "passkey" else lookup_example
    rng = random.Random(f"{task}/{distance}/{seed}")
    for _ in range(count):
        yield make(text, distance, rng)


def _word(rng: random.Random) -> str:
    """A name from the list or an invented one, so that matching cannot rest on a fixed list."""
    if rng.random() < 0.5:
        return rng.choice(NAMES)
    syllables = "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4))
    )
    return syllables.capitalize()


# A piece of a training sequence: its bytes and one loss weight per byte.
Piece = tuple[bytes, list[float]]


def _weighted(parts: list[tuple[str, float]]) -> Piece:
    data = b"".join(s.encode() for s, _ in parts)
    return data, [w for s, w in parts for _ in s.encode()]


def _pieces(length: int, rng: random.Random, answer_weight: float) -> list[tuple[float, Piece]]:
    """Timed statements and questions that together take at most ~70 % of ``length`` bytes.

    First mentions of a random value cannot be predicted, so they carry no weight.
    """
    timed: list[tuple[float, Piece]] = []
    room = int(length * (rng.uniform(0.3, 0.7) if length <= 1100 else rng.uniform(0.2, 0.6)))
    has_pass = rng.random() < 0.4
    while room > 100:
        start = rng.uniform(0.0, 0.7)
        if has_pass:
            value, has_pass = digits(rng, PASS_DIGITS), False
            stated = _weighted(
                [
                    ("\nThe pass key is ", 0.5),
                    (value, 0.0),
                    (". Remember it. ", 0.5),
                    (value, answer_weight / 2),
                    (" is the pass key.\n", 0.5),
                ]
            )
            asked = _weighted([(passkey_query(), 0.5), (value, answer_weight), (".\n", 0.5)])
        else:
            value, name = digits(rng, NUMBER_DIGITS), _word(rng)
            stated = _weighted(
                [
                    ("\nThe number of ", 0.5),
                    (name, 0.0),
                    (" is ", 0.5),
                    (value, 0.0),
                    (".\n", 0.5),
                ]
            )
            asked = _weighted(
                [
                    ("\nWhat is the number of ", 0.5),
                    (name, 0.2),
                    ("? The number of ", 0.5),
                    (name, 1.0),
                    (" is ", 0.5),
                    (value, answer_weight),
                    (".\n", 0.5),
                ]
            )
        timed.append((start, stated))
        room -= len(stated[0])
        for _ in range(rng.choice((1, 1, 2, 3))):
            timed.append((rng.uniform(start, 1.0), asked))
            room -= len(asked[0])
    return timed


def recall_sequence(
    filler: bytes, length: int, rng: random.Random, answer_weight: float = 4.0
) -> tuple[bytes, list[float]]:
    """A training sequence of ``length`` bytes: planted values and questions inside ``filler``.

    Returns the bytes and the loss weight of each byte as a prediction target.
    """
    timed = _pieces(length, rng, answer_weight)
    timed.sort(key=lambda item: item[0])
    spare = max(0, length - sum(len(piece[0]) for _, piece in timed))
    data, weights, used = bytearray(), [], 0
    for time, (piece, piece_weights) in timed:
        upto = int(spare * time)
        data += filler[used:upto]
        weights += [1.0] * len(filler[used:upto])
        used = max(used, upto)
        data += piece
        weights += piece_weights
    tail = filler[used : used + max(0, length - len(data))]
    data += tail
    weights += [1.0] * len(tail)
    return bytes(data[:length]), weights[:length]


def periodic_sequence(filler: bytes, length: int, rng: random.Random) -> tuple[bytes, list[float]]:
    """A random string, or an excerpt, over and over: all after the first round is a copy."""
    # Log-uniform periods: short ones show the pattern, long ones stretch it.
    period = int(4 * (length / 2 / 4) ** rng.random())
    if rng.random() < 0.25:
        unit = filler[:period]
    else:
        letters = rng.sample("abcdefghijklmnopqrstuvwxyz0123456789 ", rng.randint(10, 37))
        unit = "".join(rng.choices(letters, k=period)).encode()
    weights = [0.0] * (period + 1) + [1.0] * (length - period - 1)
    return (unit * (length // period + 1))[:length], weights


def copy_sequence(filler: bytes, length: int, rng: random.Random) -> tuple[bytes, list[float]]:
    """Random strings that come back, at once or between excerpts: dense practice of copying."""
    if rng.random() < 0.8:
        return periodic_sequence(filler, length, rng)
    data, position = bytearray(), 0
    weights: list[float] = []
    seen: list[bytes] = []
    while len(data) < length:
        if seen and rng.random() < 0.6:
            piece = rng.choice(seen)
            # The first bytes of a repeat only choose which string it is.
            weight = [0.0] * 3 + [1.5] * (len(piece) - 3)
        else:
            alphabet = rng.choice(("0123456789", "abcdefghijklmnopqrstuvwxyz", "aeioubdgklmnst"))
            piece = "".join(rng.choices(alphabet, k=rng.randint(8, 20))).encode()
            seen.append(piece)
            weight = [0.0] * len(piece)
        data += piece + b"\n"
        weights += [*weight, 0.5]
        gap = rng.randrange(0, max(2, length // 10))
        data += filler[position : position + gap]
        weights += [1.0] * len(filler[position : position + gap])
        position += gap
    return bytes(data[:length]), weights[:length]
