"""Checkpoints of earlier versions of this package, read by `from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations.tiny import FAMILIES, QUIET, converted, tokens

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [*QUIET]


@pytest.mark.parametrize("family", FAMILIES)
def test_scalar_coefficients_without_axes_load(family: str, tmp_path: Path) -> None:
    model = converted(family, "learnable")
    expected = model(tokens())[0]
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = safetensors.load_file(file)
    scalars = {name: x.reshape(()) for name, x in saved.items() if "lambda" in name}
    assert scalars
    safetensors.save_file({**saved, **scalars}, file, metadata={"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(tokens())[0], expected)
    assert all(p.shape == (1,) for name, p in loaded.named_parameters() if "lambda" in name)
