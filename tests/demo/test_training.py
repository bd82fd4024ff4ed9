"""Training side by side within a limit, and the memory saved for backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resformer_kernels.demo.corpus import Corpus
from resformer_kernels.demo.memory import saved_activation_bytes
from resformer_kernels.demo.training import ModelRun, Plan, configs, train

TINY = Plan(dim=16, num_layers=2, num_heads=2, seqlen=16, batch=4, max_windows=16)


def corpus() -> Corpus:
    text = torch.frombuffer(bytearray(b"abcdefgh" * 4096), dtype=torch.uint8)
    return Corpus("letters", text[:-4096], text[-4096:], 1, 1, "the end")


def test_models_are_of_equal_size() -> None:
    sizes = {name: config.mlp_hidden for name, config in configs(TINY).items()}
    assert list(sizes) == ["Transformer", "ResFormer", "SVFormer"]
    runs: list[ModelRun] = []
    train(corpus(), TINY, 0.01, runs, lambda *_: None)
    counts = [run.parameters for run in runs]
    assert max(counts) - min(counts) <= 3 * TINY.dim * TINY.num_layers


def test_training_keeps_its_limit_and_learns() -> None:
    runs: list[ModelRun] = []
    seen: list[tuple[float, int]] = []
    train(corpus(), TINY, 4.0, runs, lambda *progress: seen.append(progress))
    assert [run.name for run in runs] == ["Transformer", "ResFormer", "SVFormer"]
    assert len({run.steps for run in runs}) == 1
    assert seen[-1] == (1.0, runs[0].steps)
    for run in runs:
        assert run.final_bits is not None
        assert run.final_bits < 6.0 < run.curve[0][1]
        assert run.final_windows == runs[0].final_windows > 0
        assert run.latest_bits == run.final_bits
        assert run.activation_bytes > 0
        assert run.median_step is not None


def test_even_no_time_gives_a_step_of_each() -> None:
    runs: list[ModelRun] = []
    train(corpus(), TINY, 1e-6, runs, lambda *_: None)
    assert [run.steps for run in runs] == [1, 1, 1]


def test_a_cut_off_leaves_what_there_was() -> None:
    runs: list[ModelRun] = []

    def interrupt(_share: float, steps: int) -> None:
        if steps == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(corpus(), TINY, 60.0, runs, interrupt)
    for run in runs:
        assert run.steps == 2
        assert run.final_bits is None
        assert run.latest_bits == run.curve[-1][1]


def test_saved_activations_are_counted_once_and_parameters_are_not() -> None:
    model = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)
    # Linear saves x (and its weight); x * x saves x again.
    assert saved_activation_bytes(model, lambda: (model(x) * model(x)).sum()) == (4 + 8) * 8 * 4
    y = x.clone().requires_grad_()
    assert saved_activation_bytes(model, lambda: (y * y).sum()) == 4 * 8 * 4
