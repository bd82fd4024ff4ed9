"""`attn_implementation="resformer"` held to eager in the families of transformers.

A few families run always, one for every way in which models make and pass masks. `make
test-families` runs all, and writes a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from tests.families.check import DIFFERENT, ERROR, UNBUILT, examine
from tests.families.models import families, folder
from tests.families.report import unserved, worst
from tests.families.unbuilt import NOT_BUILT
from tests.integrations.tiny import QUIET

pytestmark = [*QUIET]

ALWAYS = (
    "llama",  # causal order
    "mistral",  # a causal window
    "gemma3",  # both, soft caps, images that attend to themselves
    "gpt_oss",  # sinks
    "llama4_text",  # chunks
    "bert",  # both ways
    "modernbert",  # a window both ways
    "bart",  # cross-attention
    "t5",  # position biases
    "mllama_text_model",  # cross-attention beside a cache
    "clip",  # a causal text tower and one of images, which pass no mask
    "qwen2_5_vl_vision",  # packed windows
    "deepseek_v3",  # values narrower than keys
    "deepseek_v32",  # selected keys
    "minimax_m3_vl_text",  # selected blocks of keys
    "whisper",  # spectrograms
    "wav2vec2",  # waveforms, padded
    "sam",  # an image encoder with attention code of its own
    "llama, is_causal=False",
    "gptj",  # attention code of its own: refused
    "falcon",  # the same, though sdpa is served
)

CHOSEN = "its attention is one of two classes of its own, eager's and sdpa's, in a dictionary"
REFUSED_THOUGH_SDPA_SERVES = {"data2vec": CHOSEN, "falcon": CHOSEN}
"""Folders of transformers/models, five at most, with the reason."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--families", default=None) is not None
        metafunc.parametrize("family", families() if everything else ALWAYS)


def test_resformer_is_eager_or_refused(
    family: str, record_property: Callable[[str, object], None]
) -> None:
    results = [dataclasses.asdict(result) for result in examine(family)]
    record_property("results", {family: results})
    wrong = [f"{x['model']}: {x['detail']}" for x in results if x["status"] in (DIFFERENT, ERROR)]
    assert wrong == []
    assert not unserved(results) or folder(family) in REFUSED_THOUGH_SDPA_SERVES
    assert (worst(results) == UNBUILT) == (family in NOT_BUILT), results


def test_few_are_refused_that_sdpa_serves() -> None:
    assert len(REFUSED_THOUGH_SDPA_SERVES) <= 5


def test_most_families_are_built() -> None:
    assert set(NOT_BUILT) <= set(families())
    assert len(families()) - len(NOT_BUILT) >= 500
