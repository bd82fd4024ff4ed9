"""What is not served is refused with a message, and never ends vLLM itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from resformer_kernels.integrations.vllm import BACKEND, BELOW, LEAST, register
from tests.vllm.process import Engines
from tests.vllm.tiny import Saved


def test_registering_again_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for _ in range(2):
        register()
    assert caplog.records == []
    assert AttentionBackendEnum[BACKEND].get_path().endswith(".ResFormerBackend")


NAMES = ("llama", "svformer")
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def test_another_version_of_vllm_goes_on_without_us(
    engines: Engines, models: dict[str, Saved]
) -> None:
    answers, stderr = engines.run(
        {name: (name, {}) for name in ("llama", "svformer")}, version="0.99.1"
    )
    assert f"it takes vLLM {LEAST[0]}.{LEAST[1]} or newer and below {BELOW[0]}.{BELOW[1]}" in stderr
    assert "got 0.99.1" in stderr
    assert answers["llama"].error == ""
    assert str(answers["llama"].tokens[0]) == str(models["llama"].tokens)
    assert "svformer_llama" in answers["svformer"].error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alibi_slopes", [1.0, 0.5]),
        ("attn_type", "encoder_only"),
        ("attn_type", "encoder_decoder"),
        ("kv_sharing_target_layer_name", "model.layers.0.self_attn.attn"),
        ("sinks", [0.0, 0.0]),
    ],
)
def test_options_of_attention(name: str, value: Any) -> None:
    from resformer_kernels.integrations.vllm.backend import Implementation

    with pytest.raises(ValueError, match=name):
        Implementation(2, 32, 1.0, **{name: value})


def test_the_backend_of_another_model() -> None:
    from resformer_kernels.integrations.vllm.backend import Implementation

    with pytest.raises(ValueError, match="serves an SVFormer's layers alone"):
        Implementation(2, 32, 1.0).process_weights_after_loading(torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size 1.*got 2"),
        ({"enable_lora": True}, "LoRA"),
        (
            {"kv_transfer_config": CONNECTOR},
            "kv_transfer",
        ),
    ],
)
def test_options_of_vllm(options: dict[str, Any], message: str, models: dict[str, Saved]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from resformer_kernels.integrations.vllm.models import SVFormerForCausalLM

    arguments = EngineArgs(
        model=str(models["svformer"].folder), skip_tokenizer_init=True, **options
    )
    with pytest.raises(ValueError, match=message):
        SVFormerForCausalLM(vllm_config=arguments.create_engine_config())
