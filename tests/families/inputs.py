"""Inputs of any model of transformers, from the names of its forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.families.tiny import FIRST_SPECIAL, IMAGE

BATCH, LENGTH, SHORTER, LONGER, PADDING = 2, 11, 7, 13, 4
FRAMES, SAMPLES = 64, 1600


@dataclass
class Case:
    """Arguments of a forward pass, and which positions of its sequences are attended to."""

    name: str
    arguments: dict[str, Any]
    masks: list[Tensor] = field(default_factory=list)

    def changed(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The arguments with each tensor changed."""
        return {k: change(x) if isinstance(x, Tensor) else x for k, x in self.arguments.items()}

    def double(self) -> Case:
        """The same in float64."""
        wider = self.changed(lambda x: x.double() if x.is_floating_point() else x)
        return Case(self.name, wider, self.masks)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(length: int, seed: int = 0, batch: int = BATCH) -> Tensor:
    """Token ids that are neither padding nor special, (batch, length)."""
    return torch.randint(5, FIRST_SPECIAL - 4, (batch, length), generator=generator(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def padding(length: int, side: str, count: int = PADDING) -> Tensor:
    """A mask of two sequences, the second shorter by `count`, (2, length)."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if side == "right":
        mask[1, -count:] = 0
    elif side == "left":
        mask[1, :count] = 0
    return mask


def parts(config: Any) -> Iterator[Any]:
    """A configuration and all of its parts."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from parts(part)


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first value of these names in a configuration or its parts."""
    for part in parts(config):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _image(config: Any) -> Tensor:
    size = find(config, "image_size", "img_size", "input_size", default=IMAGE)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    return noise(BATCH, channels, height, width)


def _video(config: Any) -> Tensor:
    images = _image(config)
    frames = find(config, "num_frames", "frames_per_clip", default=2)
    return images[:, None].repeat(1, frames, 1, 1, 1)


def _boxes(config: Any) -> Tensor:
    del config
    low = torch.randint(0, 40, (BATCH, LENGTH, 2), generator=generator(0))
    return torch.cat([low, low + torch.randint(1, 40, low.shape, generator=generator(1))], -1)


def _mel(config: Any) -> Tensor:
    bins = find(config, "num_mel_bins", "input_feat_per_channel", "feature_size", default=16)
    return noise(BATCH, bins, FRAMES)


def _patches(config: Any) -> tuple[Tensor, Tensor]:
    """Two images of 4 x 4 patches, each patch one row, and the numbers of patches along time,
    height and width."""
    patch = find(config, "patch_size", default=16)
    times = find(config, "temporal_patch_size", default=1)
    channels = find(config, "in_channels", "num_channels", "in_chans", default=3)
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    return noise(16 * BATCH, channels * times * patch**2), grid


def positioned(patch: int, name: str) -> dict[str, Tensor]:
    """Two images of 3 x 3 patches, each patch one row, and the columns and rows of patches."""
    places = torch.arange(9)
    positions = torch.stack([places % 3, places // 3], 1).expand(BATCH, -1, -1)
    return {"pixel_values": noise(BATCH, 9, 3 * patch**2), name: positions}


def _width(config: Any) -> int:
    return int(find(config, "hidden_size", "d_model", "embed_dim"))


_MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": lambda _: ids(LENGTH),
    "decoder_input_ids": lambda _: ids(SHORTER, seed=1),
    "pixel_values": _image,
    "bbox": _boxes,
    "input_features": _mel,
    "input_values": lambda _: noise(BATCH, SAMPLES),
    "inputs_embeds": lambda config: noise(BATCH, LENGTH, _width(config)),
    "hidden_states": lambda config: noise(BATCH, LENGTH, _width(config)),
    "pixel_values_videos": _video,
    "grid_thw": lambda config: _patches(config)[1],
}


def signature(model: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(model).forward).parameters)


def _sets(names: dict[str, inspect.Parameter], main: str) -> Iterator[list[str]]:
    """Names of arguments to try together, what says most first."""
    known = [name for name in _MAKERS if name in names]
    if "input_ids" in known:
        known = [name for name in known if name not in ("inputs_embeds", "hidden_states")]
    required = [name for name in known if names[name].default is inspect.Parameter.empty]
    decoder = [name for name in ("decoder_input_ids",) if name in names]
    yield known
    yield [*required, main, *decoder]
    for name in (main, "input_ids", "pixel_values", "input_features", "inputs_embeds"):
        yield [name, *decoder]
        yield [name]


def attempts(model: Any, given: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Sets of arguments for one forward pass, of which the first that runs is taken."""
    names = signature(model)
    if given is not None:
        given = {name: x for name, x in given.items() if name in names or "kwargs" in names}
        yield given
        return
    seen: list[set[str]] = []
    for chosen in _sets(names, model.main_input_name):
        usable = {name for name in chosen if name in names and name in _MAKERS}
        if not usable or usable in seen:
            continue
        seen.append(usable)
        made = {name: _MAKERS[name](model.config) for name in _MAKERS if name in usable}
        if "grid_thw" in made:
            main = "pixel_values" if "pixel_values" in names else "hidden_states"
            made[main] = _patches(model.config)[0]
        yield made
        if "input_features" in made:
            # Some models have time before frequency.
            yield {**made, "input_features": made["input_features"].mT}
        if "input_values" in made:
            yield {**made, "input_values": made["input_values"][:, None]}


def padded(model: Any, arguments: dict[str, Any], side: str) -> Case | None:
    """The same arguments with two sequences of different lengths; None where nothing pads them."""
    if "attention_mask" not in signature(model) or "attention_mask" in arguments:
        return None
    main = next((x for x in ("input_ids", "input_values", "inputs_embeds") if x in arguments), None)
    if main is None or arguments[main].shape[0] != BATCH:
        return None
    if arguments[main].dim() != (3 if main == "inputs_embeds" else 2):
        return None
    length = arguments[main].shape[1]
    count = PADDING if main != "input_values" else length // 3
    mask = padding(length, side, count)
    changed = {**arguments, "attention_mask": mask}
    if main == "input_ids":
        changed["input_ids"] = arguments["input_ids"].masked_fill(mask == 0, 0)
    return Case(side, changed, [mask])


def _images(model: Any) -> Iterator[dict[str, Tensor]]:
    """Two images in the forms that models take them."""
    if "image_grid_thw" in signature(model):
        patches, grid = _patches(model.config)
        yield {"pixel_values": patches, "image_grid_thw": grid}
    if "image_position_ids" in signature(model):
        yield positioned(find(model.config, "patch_size"), "image_position_ids")
    images = _image(model.config)
    sizes = torch.tensor([images.shape[-2:]] * BATCH)
    for each in (images, images[:, None], torch.stack([images, images], 1)):
        yield {"pixel_values": each}
        yield {"pixel_values": each, "image_sizes": sizes}


def with_images(model: Any) -> Case | None:
    """Text with the tokens of two images in it, where the model says how many an image has. Raises
    what the first form of the images raised where the model takes none."""
    token = find(model.config, "image_token_id", "image_token_index", "im_token_id")
    if token is None or not hasattr(model, "get_image_features"):
        return None
    first: Exception | None = None
    for images in _images(model):
        try:
            with torch.no_grad():
                found = model.get_image_features(**images)
        except Exception as error:  # noqa: BLE001 - the next form may run
            first = first or error
            continue
        if hasattr(found, "last_hidden_state"):
            pooled = getattr(found, "pooler_output", None)
            found = found.last_hidden_state if pooled is None else pooled
        rows = found if isinstance(found, (list, tuple)) else [found.flatten(0, -2)]
        return _among_text(model, images, token, sum(len(x) for x in rows) // BATCH)
    raise first or ValueError("no images known")


def _among_text(model: Any, images: dict[str, Tensor], token: int, count: int) -> Case:
    """Left-padded text with `count` tokens of an image in each sequence."""
    text = ids(LENGTH)
    tokens = torch.cat([text[:, :3], text.new_full((BATCH, count), token), text[:, 3:]], 1)
    mask = padding(tokens.shape[1], "left", 2)
    arguments = {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask, **images}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in signature(model):
            arguments[name] = (tokens == token).long()
    return Case("image", arguments, [mask])
