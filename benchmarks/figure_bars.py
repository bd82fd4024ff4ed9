"""Speed beside every peer, a row a case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.figure_data import Cases, Drawing, sizes
from benchmarks.figure_style import as_svg, colour, decades, legend_above, look
from resformer_kernels.bench.timing import Result

_ROWS = 16
"""At most, in one panel."""

_BESIDE_PEERS = "How many times as long each peer takes; the bar and its figure are the fastest's."
_SPEED = (
    ("attention-forward", "Attention, forward", "attention forward", False, _BESIDE_PEERS),
    ("attention-backward", "Attention, backward", "attention backward", False, _BESIDE_PEERS),
    ("decode", "Decoding, 12 layers", "decode", False, _BESIDE_PEERS),
    (
        *("decode-shared", "Decoding, one V for all layers", "decode", True),
        "How many times as long a V in each layer takes, by our own kernel.",
    ),
    (
        *("decode-models", "Decoding with whole models of transformers", "decode in transformers"),
        *(None, _BESIDE_PEERS),
    ),
    ("mix", "Mixing alone", "mix", False, _BESIDE_PEERS),
    ("reservoir", "Reservoirs", "reservoir", False, _BESIDE_PEERS),
    ("scan", "Linear scan", "scan", False, _BESIDE_PEERS),
    (
        *("scan-copy", "Linear scan beside a copy", "scan", True),
        "How many times as long a plain copy of as many bytes takes, into memory that is at hand.",
    ),
)
"""Name, title, group, whether beside a yardstick (None: both), caption."""


def speed(cases: Cases) -> list[Drawing]:
    """A panel for each kind of case that was measured."""
    drawings = []
    for name, title, group, yardstick, caption in _SPEED:
        results = cases.group(group, yardstick=yardstick)[:_ROWS]
        if not results:
            continue
        svg = as_svg(0.9 + 0.34 * len(results), _bars, results)
        drawings.append(Drawing(f"speed-{name}", "Speed beside every peer", title, caption, svg))
    return drawings


def _bars(axes: Any, results: Sequence[Result]) -> None:
    most = 1.0
    for y, result in enumerate(results):
        low, high = sorted((1.0, result.ratio))
        name = "ours" if result.ratio >= 1.0 else "bad"
        axes.barh(y, high - low, 0.62, left=low, color=colour(name), alpha=0.28)
        # The fastest first: of several forms of one peer, it is the one that is drawn.
        drawn: set[str] = set()
        for peer in result.peers:
            style = look(peer)
            if style.label in drawn:
                continue
            drawn.add(style.label)
            ratio = result.timings[peer].median / result.ours.median
            most = max(most, ratio)
            axes.plot(
                *(ratio, y),
                marker=style.marker,
                markersize=6,
                markeredgewidth=0,
                linestyle="none",
                color=colour(style.colour),
                label=style.label,
            )
    axes.axvline(1.0, color=colour("muted"), linewidth=1.0)
    axes.set_xscale("log")
    least = min(result.ratio for result in results)
    axes.set_xlim(min(0.9, 0.85 * least), 1.25 * max(most, 2.0))
    decades(axes.xaxis, lambda value: f"{value:g}×")
    axes.set_yticks(range(len(results)), [_short(result) for result in results], fontsize=8.5)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    right = axes.secondary_yaxis("right")
    right.set_yticks(
        range(len(results)),
        [f"{r.ratio:.1f}×" if r.ratio < 99.5 else f"{r.ratio:.0f}×" for r in results],
    )
    right.spines["right"].set_visible(False)
    for label in right.get_yticklabels():
        label.set_fontweight("bold")
        label.set_color(colour("ours"))
    legend_above(axes)


_DTYPES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "complex64": "c64"}
_MARKS = {
    "mix_value_embedding": "embedding",
    "of 2 ": "2 sources",
    "of 8 ": "8 sources",
    "one V": "one V",
    "Llama": "Llama",
    "SVFormer": "SVFormer",
    "sparse": "sparse",
    "constant gates": "constant gates",
    " backward ": "backward",
}
"""What tells cases of one panel apart, by what their names say."""


def _short(result: Result) -> str:
    """A name that fits beside a bar: what its panel's title says is left out."""
    marks = [mark for text, mark in _MARKS.items() if text in result.name]
    shape = [] if result.group == "mix" else [f"{k}{v}" for k, v in sizes(result.name).items()]
    told = result.group.split()
    found = [*shape, *(mark for mark in marks if mark not in told)]
    words = [*found, _DTYPES.get(result.dtype, result.dtype)]
    return " ".join(word for word in words if word)
