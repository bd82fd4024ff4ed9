"""What a value-residual model of transformers adds to its family's config, and its mixes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from resformer_kernels.nn import (
    DenseMix,
    FirstValues,
    FixedMix,
    LearnedMix,
    OwnValues,
    ValueMix,
)

FIXED = {"identity": (0.5, 0.5), "constant": (1.0, 2.0), "sparse": (1.0, 5.0)}
"""(lambda_v, lambda_first) of the variants that do not learn them."""
LEARNED = {"learnable": (0.5, 0.5), "learnable-plus": (0.5, 0.5)}
"""What the variants that learn their coefficients start from."""
RESFORMER_VARIANTS = (*FIXED, *LEARNED, "dense")
SVFORMER = "svformer"


@dataclasses.dataclass(kw_only=True)
class ValueResidualFields:
    """Fields beside those of the family's config. They are checked when the config is built.

    Attributes:
        value_residual: a name of `resformer_kernels.models.VARIANTS`.
        value_residual_layers: the layers, counted from 0, that attend over more than their own
            values. None: all but layer 0; of `sparse` the last three eighths.
        lambda_v: multiplies a layer's own values, at the start where it is learned. None: the
            variant's own.
        lambda_first: multiplies the first layer's values.
    """

    variants: ClassVar[tuple[str, ...]] = ()

    value_residual: str = "learnable"
    value_residual_layers: list[int] | None = None
    lambda_v: float | None = None
    lambda_first: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Let the family's config fill itself in, then resolve and check what is added."""
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.resolve_value_residual()

    def resolve_value_residual(self) -> None:
        """Put numbers where None stands for a default; ValueError where a field is wrong."""
        if self.value_residual not in self.variants:
            raise ValueError(
                f"value_residual of {type(self).__name__} must be one of "
                f"{', '.join(self.variants)}, got {self.value_residual!r}"
            )
        count = int(self.num_hidden_layers)  # type: ignore[attr-defined]
        self.value_residual_layers = _layers(self.value_residual, self.value_residual_layers, count)
        defaults = {**FIXED, **LEARNED}.get(self.value_residual)
        for i, name in enumerate(("lambda_v", "lambda_first")):
            value = getattr(self, name)
            if defaults is None:
                if value is not None:
                    raise ValueError(
                        f"{name} must be None for {self.value_residual}, which has no such "
                        f"coefficient, got {value!r}"
                    )
                continue
            if value is None:
                setattr(self, name, defaults[i])
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number or None, got {value!r}")
            elif not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
            else:
                setattr(self, name, float(value))


def _layers(variant: str, layers: Any, count: int) -> list[int]:
    if count < 2:
        raise ValueError(f"a value residual needs at least 2 layers, got num_hidden_layers {count}")
    if layers is None:
        mixing = count - 1
        if variant == "sparse":
            mixing = min(mixing, max(1, round(3 * count / 8)))
        return list(range(count - mixing, count))
    found = list(layers)
    integers = all(isinstance(x, int) and not isinstance(x, bool) for x in found)
    if not found or not integers or len(set(found)) != len(found):
        raise ValueError(f"layers must be distinct integers, at least one, got {found}")
    if min(found) < 1 or max(found) >= count:
        raise ValueError(
            f"layers must lie within 1 and {count - 1}: layer 0 is where the first values come "
            f"from; got {found}"
        )
    return sorted(found)


def build_value_mix(config: Any, layer: int) -> ValueMix:
    """The mix of layer `layer`, counted from 0."""
    if layer not in config.value_residual_layers:
        return OwnValues()
    variant = config.value_residual
    if variant == SVFORMER:
        return FirstValues()
    if variant == "dense":
        return DenseMix(layer + 1)
    if variant in FIXED:
        return FixedMix(config.lambda_v, config.lambda_first)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return LearnedMix(
        heads if variant == "learnable-plus" else None,
        lambda_v=config.lambda_v,
        lambda_first=config.lambda_first,
    )
