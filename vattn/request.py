"""What a generation is asked to do, and which options go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vattn.allocator.errors import VattnError

ASSETS = Path(__file__).parent / "assets"
SHIPPED_MODEL = ASSETS / "model"
SHIPPED_TEXT = ASSETS / "texts" / "persuasion.txt"
CACHES = ("vattn", "dynamic", "static")
ATTENTIONS = ("vattn", "sdpa", "eager")
DTYPES = ("auto", "float32", "float16", "bfloat16")
DEFAULT_BUDGET = 1024  # tokens that a selector may read


class RequestError(VattnError, ValueError):
    """A generation was asked for with options that do not go together."""


@dataclass(frozen=True)
class Request:
    """One generation: what to run, on what, and how."""

    model: Path = SHIPPED_MODEL
    prompts: tuple[str, ...] = ()
    batch: int = 1
    new_tokens: int = 256
    context: int | None = None
    cache: str = "vattn"
    attention: str = "vattn"
    dtype: str = "auto"
    page_bytes: int | None = None
    rows: str | None = None
    budget_bytes: int | None = None
    select: str | None = None
    budget: str | None = None
    policy: str | None = None
    lorc: str | None = None
    host_bytes: int | None = None
    seed: int = 0
    temperature: float = 0.0
    trace: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("cache", self.cache, CACHES),
            ("attn", self.attention, ATTENTIONS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in choices:
                raise RequestError(f"--{name} is one of {', '.join(choices)}, got {value!r}")
        for name, number in (("batch", self.batch), ("max-new-tokens", self.new_tokens)):
            if number < 1:
                raise RequestError(f"--{name} must be at least 1, got {number}")
        if self.batch < len(self.prompts):
            raise RequestError(
                f"--batch {self.batch} leaves out some of the {len(self.prompts)} prompts"
            )
        if self.context is not None and self.context < 1:
            raise RequestError(f"--context must be at least 1 token, got {self.context}")
        self._check_selection()
        self._check_latents()
        if self.temperature < 0:
            raise RequestError(f"--temperature must not be negative, got {self.temperature}")

    def budget_tokens(self, prompt_tokens: int) -> int:
        """Tokens that ``select`` may read, of a prompt so long.

        Raises:
            RequestError: neither a number nor a share of 0% to 100%.
        """
        given = self.budget_given()
        if given is None:
            return DEFAULT_BUDGET
        return given if isinstance(given, int) else int(prompt_tokens * given)

    def budget_given(self) -> float | int | None:
        """The budget: a number of tokens (an int), or a share of the prompt (a float).

        Raises:
            RequestError: neither a number nor a share of 0% to 100%.
        """
        text = self.budget
        if text is None:
            return None
        try:
            if not text.endswith("%"):
                return int(text)
            share = float(text[:-1]) / 100
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            raise RequestError(
                f"--budget is a number of tokens or a share of the prompt such as 25%, got {text!r}"
            )
        return share

    def lorc_share(self) -> float | None:
        """The share of the cache's bytes that latents take; None: there are none.

        Raises:
            RequestError: no share.
        """
        if self.lorc is None:
            return None
        try:
            return float(self.lorc[:-1]) / 100 if self.lorc.endswith("%") else float(self.lorc)
        except ValueError:
            raise RequestError(
                f"--lorc is a share of the cache's bytes such as 50%, got {self.lorc!r}"
            ) from None

    def _check_latents(self) -> None:
        self.lorc_share()
        others = {"select": self.select, "policy": self.policy, "host-tier": self.host_bytes}
        others |= {"rows": self.rows, "snapshot": self.trace or None}
        for name, value in others.items():
            if self.lorc is not None and value is not None:
                raise RequestError(f"--lorc does not go with --{name}: leave one of them out")

    def _check_selection(self) -> None:
        if self.select is None and self.policy is None and self.budget is not None:
            raise RequestError(
                "--budget is what --select may read or --policy keeps: name a selector or a policy"
            )
        if self.select is not None and self.policy is not None:
            raise RequestError("--select reads among all tokens, --policy keeps few: pass one")
        if self.policy is not None and (self.trace or self.host_bytes is not None):
            other = "--snapshot" if self.trace else "--host-tier"
            raise RequestError(f"--policy does not go with {other}: leave one of them out")
        asked = {"select": self.select, "policy": self.policy, "host-tier": self.host_bytes}
        asked["lorc"] = self.lorc
        for name, value in asked.items():
            if value is not None and self.cache != "vattn":
                raise RequestError(f"--{name} needs --cache vattn, got {self.cache}")
            if value is not None and name in ("select", "policy") and self.attention != "vattn":
                raise RequestError(f"--{name} needs --attn vattn, got {self.attention}")


def without_text(request: Request) -> dict[str, Any]:
    """The request as it goes into a report: the prompts are left out."""
    plain = {name: getattr(request, name) for name in request.__dataclass_fields__}
    del plain["prompts"], plain["trace"]
    return {**plain, "model": str(request.model)}
