"""Text of the models: the record, the cache's bytes, and the limit."""

from __future__ import annotations

import time

import torch

from resformer_kernels.demo.corpus import Corpus
from resformer_kernels.demo.training import Plan, configs
from resformer_kernels.demo.writing import Writing, _readable, write
from resformer_kernels.models import LanguageModel

PLAN = Plan(dim=16, num_layers=4, num_heads=2, seqlen=24)


def written(seconds: float) -> list[Writing]:
    text = torch.arange(200, dtype=torch.uint8)
    corpus = Corpus("numbers", text, text + 40, 1, 1, "by hand")
    models = {name: LanguageModel(config) for name, config in configs(PLAN).items()}
    writings: list[Writing] = []
    write(models, corpus, seconds, writings, lambda _: None)
    return writings


def test_both_models_write_as_much_as_fits() -> None:
    transformer, svformer = written(60.0)
    assert [transformer.name, svformer.name] == ["Transformer", "SVFormer"]
    assert transformer.prompt == svformer.prompt == "()*+,-"
    assert (svformer.prompt_length, svformer.new_tokens) == (6, 19)
    assert len(svformer.seconds) == len(transformer.seconds) == 7
    assert svformer.tokens_per_second > 0
    assert 8 * svformer.cache_bytes == 5 * transformer.cache_bytes == 5 * 8 * 24 * 16 * 4


def test_a_limit_leaves_one_round() -> None:
    start = time.perf_counter()
    assert {len(writing.seconds) for writing in written(0.0)} == {1}
    assert time.perf_counter() - start < 60


def test_bytes_that_are_no_text_are_shown() -> None:
    assert _readable(torch.tensor([72, 105, 10, 255, 7])) == "Hi\n\ufffd\ufffd"
