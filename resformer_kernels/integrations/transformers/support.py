"""Which model classes of transformers `attn_implementation="resformer"` serves.

transformers asks for a class's support of the implementations that it knows, and lets a registered
one pass for every class. A class with attention code of its own would then be given masks that the
code cannot read, so the question is asked here.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

_log = logging.get_logger("transformers.resformer")


_OWN_PARTS = re.compile(r"Sam(HQ)?Vision(Encoder|Model)$")
"""Parts of models whose attention is code of their own, chosen by a table that has only eager and
sdpa: the image encoder of SAM, alone and in what is built from it."""


def refusal(model_class: Any, implementation: str) -> str | None:
    """Why a model class cannot be served, or None: it must declare support for sdpa or for flash
    attention, and call its attention through transformers' `AttentionInterface`.
    """
    declares = model_class._supports_sdpa or model_class._supports_flash_attn
    if not declares:
        reason = "its class declares support for neither sdpa nor flash attention"
    elif not (
        model_class._can_set_attn_implementation() or model_class._supports_attention_backend
    ):
        reason = "its attention does not call the functions that are registered with transformers"
    else:
        return None
    return (
        f"{model_class.__name__} does not support attn_implementation={implementation!r}: {reason}"
        ". Load it with attn_implementation='eager'"
    )


def check_models(implementation: str) -> None:
    """Let every model of transformers raise ValueError, when it is made or when the implementation
    is set, if its class cannot be served by `implementation`. SAM's image encoders warn, and keep
    sdpa beside the rest of their model.

    There is no hook for this: `PreTrainedModel.get_correct_attn_implementation`, which makes the
    decision for transformers' own implementations, is wrapped once.
    """
    decide = PreTrainedModel.get_correct_attn_implementation
    if getattr(decide, "_checks", None) == implementation:
        return

    @functools.wraps(decide)
    def checked(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        found: str = decide(self, requested_attention, is_init_check)
        if found != implementation:
            return found
        if _OWN_PARTS.search(type(self).__name__):
            _log.warning_once(
                f"the attention of {type(self).__name__} is code of its own and stays with sdpa; "
                f"attn_implementation={implementation!r} serves the rest of the model"
            )
            return "sdpa"
        if message := refusal(type(self), implementation):
            raise ValueError(message)
        return found

    checked._checks = implementation  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked
