"""Every family of transformers and its model classes, built with random weights."""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any

import torch

from tests.families.overrides import CLASSES, VARIANTS
from tests.families.tiny import auto, tiny_config
from tests.integrations.tiny import transformers

modeling = importlib.import_module("transformers.models.auto.modeling_auto")

LARGEST = 12_000_000
"""Parameters of a tiny model at most: more takes too long, or too much memory."""

TASKS = (
    *("MODEL_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    *("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),
    *("MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
    *("MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    *("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING"),
    *("MODEL_FOR_CTC_MAPPING", "MODEL_FOR_RETRIEVAL_MAPPING", "MODEL_FOR_OBJECT_DETECTION_MAPPING"),
    *("MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING", "MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING"),
    *("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING", "MODEL_FOR_DEPTH_ESTIMATION_MAPPING"),
    *("MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING", "MODEL_FOR_TABLE_QUESTION_ANSWERING_MAPPING"),
)
"""Mappings from families to classes: base models, then the heads that do more than add a layer."""

_ALL = sorted(
    name[: -len("_NAMES")]
    for name in vars(modeling)
    if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
)


def families() -> list[str]:
    """The model_type of every configuration of transformers, and the variants."""
    ours = ("resformer_", "svformer_")
    # Iterating over the mapping itself misses the families that it has not loaded.
    names = list(auto.CONFIG_MAPPING.keys())
    return [x for x in names if not x.startswith(ours)] + list(VARIANTS)


def folder(family: str) -> str:
    """The folder of transformers/models that a family is in."""
    name, _ = VARIANTS.get(family, (family, {}))
    return str(auto.CONFIG_MAPPING[name].__module__.split(".")[-2])


def _named(family: str, tasks: tuple[str, ...] | list[str]) -> list[str]:
    found: list[str] = []
    for task in tasks:
        names = getattr(modeling, task + "_NAMES", {}).get(family, ())
        found += [names] if isinstance(names, str) else list(names)
    return list(dict.fromkeys(found))


def classes(family: str) -> list[Any]:
    """The classes to hold to eager: those of TASKS, else of any task, else of its own module."""
    family, _ = VARIANTS.get(family, (family, {}))
    cls = auto.CONFIG_MAPPING[family]
    if family in CLASSES:
        module = importlib.import_module(cls.__module__.replace("configuration_", "modeling_"))
        return [getattr(module, name.split()[0]) for name in CLASSES[family]]
    names = _named(family, TASKS) or _named(family, _ALL)
    if names:
        return [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    try:
        module = importlib.import_module(cls.__module__.replace("configuration_", "modeling_"))
    except ModuleNotFoundError:
        return []
    found: list[Any] = [x for x in vars(module).values() if inspect.isclass(x)]
    return [
        x
        for x in found
        if issubclass(x, transformers.PreTrainedModel)
        and x.config_class is cls
        and not x.__name__.lower().endswith("pretrainedmodel")
    ]


def build(cls: Any, config: Any, implementation: str) -> Any:
    """A model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    # A copy, as a model writes to its configuration. Experts in a loop run in float64 too.
    options = {"attn_implementation": implementation, "experts_implementation": "eager"}
    return cls._from_config(copy.deepcopy(config), **options).eval()


def check_size(cls: Any, config: Any) -> None:
    """ValueError for more than LARGEST parameters, counted without making them where that works."""
    try:
        with torch.device("meta"):
            count = sum(x.numel() for x in build(cls, config, "eager").parameters())
    except (NotImplementedError, RuntimeError):
        return
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")


def refusal(cls: Any, config: Any, implementation: str) -> Exception | None:
    """What building a class with an implementation raises, if anything."""
    try:
        with torch.device("meta"):
            build(cls, config, implementation)
    except ValueError as error:
        return error
    except Exception:  # noqa: BLE001 - some models cannot be made on the meta device
        try:
            build(cls, config, implementation)
        except Exception as error:  # noqa: BLE001 - reported
            return error
    return None


def stir(model: Any) -> None:
    """Add noise to parameters that begin as constants: a gate of zero, or a layer scale of 1e-6,
    would hide what attention computes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for x in model.parameters():
            if x.is_floating_point() and x.numel() and bool((x == x.flatten()[0]).all()):
                x += 0.3 * torch.randn(x.shape, generator=generator).to(x.dtype)


def config_of(family: str, cls: Any) -> Any:
    """The tiny configuration of a family or variant, or the part of it that is a class's."""
    name, changes = VARIANTS.get(family, (family, {}))
    config = tiny_config(name, **changes)
    for line in CLASSES.get(name, ()):
        found, *part = line.split()
        if found == cls.__name__ and part:
            return getattr(config, part[0])
    return config
