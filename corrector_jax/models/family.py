"""What an encoder family is: its sizes, its module, and where its published tensors stand.

A family is one file: a frozen dataclass that is a `Family`, and the Flax module it makes. Its line
in `pretrained.FAMILIES` gives its model_type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import flax.linen as nn
from jax.typing import DTypeLike

from corrector_jax.types import UserError, shown

_HUGE = 2.0**60
"""No number of a model is as large; infinities and what is not a number are not below it."""

_MOST_LAYERS = 10_000
"""No model has as many: its parameters are gone over one layer at a time."""


@dataclass(frozen=True)
class Place:
    """Where one published tensor stands in our tree.

    Attributes:
      path: the leaf; one called "kernel" is published [out, in], and is [in, out] here.
      name: the published name.
      shape: the published shape.
      alias: another published name of the same tensor, or "".
      copies: names under which it may be published once more.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    alias: str = ""
    copies: tuple[str, ...] = ()


Axes = Mapping[str, tuple[str | None, ...]]
"""Pattern of how a leaf's path ends -> "width" (D), "heads", "inner" or None for each axis."""


class Placed(Protocol):
    """What has published weights: an encoder, or a reader.

    Attributes:
      num_layers: how many layers.
    """

    @property
    def num_layers(self) -> int: ...  # noqa: D102

    def places(self) -> Iterator[Place]:
        """Every parameter of the module, once; the table of words is the first."""
        ...

    def axes(self) -> Axes:
        """What the axes of the large parameters are, for those who split them."""
        ...


class Family(Placed, Protocol):
    """The sizes of an encoder; what differs between families is behind these methods.

    Attributes:
      vocab_size: tokens in the vocabulary.
      hidden_size: D, the width of the hidden states.
      num_layers: how many layers.
      max_positions: the longest text, in tokens.
      pad_id: the token that fills up a row; it is attended to by nothing.
    """

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def max_positions(self) -> int: ...  # noqa: D102
    @property
    def pad_id(self) -> int: ...  # noqa: D102

    @classmethod
    def read(cls, published: Mapping[str, Any]) -> Self:
        """The sizes that a published `config.json` states; UserError for what is not supported."""
        ...

    def write(self) -> dict[str, Any]:
        """What `config.json` has to say of these sizes; `read` of it gives them back."""
        ...

    def module(self, dtype: DTypeLike) -> nn.Module:
        """The Flax module, tokens [B, T] -> hidden states [B, T, D] in `dtype`."""
        ...


def number(
    published: Mapping[str, Any], key: str, kind: type = int, default: float | None = None
) -> Any:
    """A number of `config.json`.

    Args:
      published: the content of `config.json`.
      key: its name there.
      kind: int or float.
      default: what the format takes where the key is missing or null; None = it must be there.

    Returns:
      The number, as `kind`.

    Raises:
      UserError: it is missing or not a number of that kind.
    """
    value: Any = published.get(key)
    value = default if value is None else value
    real = isinstance(value, int | float) and not isinstance(value, bool)
    most = _MOST_LAYERS if key.endswith("_layers") else _HUGE
    if not real or not abs(value) < most or value != kind(value):
        raise UserError(
            f"The model's config.json gives {shown(value)} for {key}, which must be "
            f"{'a whole number' if kind is int else 'a number'}."
        )
    return kind(value)


def only(published: Mapping[str, Any], key: str, *supported: Any, default: Any) -> Any:
    """A word of `config.json` that must be one of those supported.

    Args:
      published: the content of `config.json`.
      key: its name there.
      supported: its possible values.
      default: what the format takes where the key is missing.

    Returns:
      The value.

    Raises:
      UserError: it is another.
    """
    found = published.get(key, default)
    if found not in supported:
        words = " or ".join(repr(value) for value in supported)
        raise UserError(
            f"The model's config.json says {key} {shown(found)}, but only {words} is supported; "
            "choose another model."
        )
    return found


def check_sizes(sizes: Any, *, heads: bool = True) -> None:
    """Refuses sizes that are not positive, and a width that heads cannot share.

    Args:
      sizes: a dataclass; its fields that are numbers are looked at, but for the ids of tokens and
        position_offset.
      heads: whether `num_heads` must divide `hidden_size`.

    Raises:
      UserError: one of them is impossible.
    """
    for name, value in vars(sizes).items():
        free = name.endswith(("_id", "_offset")) or not isinstance(value, int | float)
        if not free and not isinstance(value, bool) and value <= 0:
            raise UserError(f"The model's {name} is {value}; it must be positive.")
    if heads and sizes.hidden_size % sizes.num_heads:
        raise UserError(
            f"The encoder's hidden_size {sizes.hidden_size} cannot be split over "
            f"{sizes.num_heads} heads; write a num_heads that divides it."
        )
