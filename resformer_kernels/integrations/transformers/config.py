"""Config fields of a value-residual model of transformers, and the mixes they describe."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from resformer_kernels._core.checks import integer, real
from resformer_kernels.models.config import default_sparse_layers
from resformer_kernels.models.language_model import CONSTANTS, LEARNED, mixing_layer
from resformer_kernels.nn import OwnValues, ValueMix

COEFFICIENTS = CONSTANTS | LEARNED
"""lambda_v and lambda_first of the variants that have them."""
RESFORMER_VARIANTS = (*COEFFICIENTS, "dense")
SVFORMER = "svformer"


@dataclasses.dataclass(kw_only=True)
class ValueResidualFields:
    """Fields added to the family's config. They are checked when the config is built.

    Attributes:
        value_residual: one of `resformer_kernels.models.VARIANTS`.
        value_residual_layers: the layers, counted from 0, whose values are mixed or shared. None:
            all except layer 0; for `sparse` the last three eighths.
        lambda_v: multiplies a layer's own values; the initial value where it is learned. None: the
            variant's default.
        lambda_first: the same for the first layer's values.
    """

    variants: ClassVar[tuple[str, ...]] = ()

    value_residual: str = "learnable"
    value_residual_layers: list[int] | None = None
    lambda_v: float | None = None
    lambda_first: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Initialise the family's config, then resolve and check the added fields."""
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.resolve_value_residual()

    def resolve_value_residual(self) -> None:
        """Replace None by the defaults; raise ValueError where a field is wrong."""
        if self.value_residual not in self.variants:
            raise ValueError(
                f"value_residual of {type(self).__name__} must be one of "
                f"{', '.join(self.variants)}, got {self.value_residual!r}"
            )
        count = int(self.num_hidden_layers)  # type: ignore[attr-defined]
        self.value_residual_layers = _layers(self.value_residual, self.value_residual_layers, count)
        defaults = COEFFICIENTS.get(self.value_residual)
        for i, name in enumerate(("lambda_v", "lambda_first")):
            value = getattr(self, name)
            if defaults is None:
                if value is not None:
                    raise ValueError(
                        f"{name} must be None for {self.value_residual}, which has no such "
                        f"coefficient, got {value!r}"
                    )
                continue
            value = defaults[i] if value is None else float(real(name, value))
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
            setattr(self, name, value)


def _layers(variant: str, layers: Any, count: int) -> list[int]:
    if count < 2:
        raise ValueError(f"a value residual needs at least 2 layers, got num_hidden_layers {count}")
    if layers is None:
        mixing = default_sparse_layers(count) if variant == "sparse" else count - 1
        return list(range(count - mixing, count))
    try:
        found = [integer("layers", layer) for layer in layers]
    except TypeError:
        found = []
    if not found or len(set(found)) != len(found):
        raise ValueError(f"layers must be distinct integers, at least one, got {layers!r}")
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
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    both = None if config.lambda_v is None else (config.lambda_v, config.lambda_first)
    return mixing_layer(config.value_residual, layer, heads, both)
