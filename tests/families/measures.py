"""What is measured of a model: outputs, a cache's steps, generation, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.families import compare, inputs
from tests.families.arguments import given
from tests.families.compare import Outputs
from tests.families.inputs import Case


@dataclass
class Measure:
    name: str
    take: Callable[[Any, Case], Outputs]
    case: Case
    distance: Callable[[Outputs, Outputs, list[Tensor]], tuple[float, str]] = compare.difference

    def between(self, found: Outputs, expected: Outputs) -> tuple[float, str]:
        return self.distance(found, expected, self.case.masks)


def run(model: Any, case: Case, **more: Any) -> Any:
    """One forward pass. Random numbers, where a model draws any, are the same every time."""
    torch.manual_seed(0)
    return model(**case.changed(Tensor.clone), **more)


@torch.no_grad()
def outputs(model: Any, case: Case) -> Outputs:
    return {name: x.clone() for name, x in compare.flatten("", run(model, case))}


def gradients(model: Any, case: Case) -> Outputs:
    """Gradients of a random weighting of the outputs at attended positions, by parameter."""
    before = {name: x.clone() for name, x in model.named_buffers()}
    model.train()
    model.zero_grad(set_to_none=True)
    try:
        found = dict(compare.flatten("", run(model, case)))
        total = torch.zeros(())
        for index, (_, x) in enumerate(sorted(found.items())):
            if x.requires_grad:
                rows = compare.attended(x, case.masks)
                rows = torch.where(rows.isfinite(), rows, 0.0)
                weight = inputs.noise(*rows.shape, seed=index).to(rows.dtype)
                total = total + (rows * weight).sum() / rows.detach().abs().max().clamp_min(1e-6)
        total.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, x in model.named_buffers():
                if name in before and before[name].shape == x.shape:
                    x.copy_(before[name])


@torch.no_grad()
def steps(model: Any, case: Case) -> Outputs:
    """Outputs of a prompt of five tokens, and of two continuations with a cache: one token, then
    three."""
    decoder = "decoder_input_ids" in case.arguments
    name = "decoder_input_ids" if decoder else "input_ids"
    text = inputs.ids(9, seed=3)
    arguments = dict(case.arguments)
    mask = None if decoder else arguments.pop("attention_mask", None)
    if mask is not None:
        mask = inputs.padding(9, case.name)
        text = text.masked_fill(mask == 0, 0)
    found: Outputs = {}
    for begin, end in ((0, 5), (5, 6), (6, 9)):
        arguments[name] = text[:, begin:end]
        if mask is not None:
            arguments["attention_mask"] = mask[:, :end]
        out = run(model, Case(case.name, arguments), use_cache=True)
        # A cache is not copied: it grows.
        arguments["past_key_values"] = out["past_key_values"]
        masks = [] if mask is None else [mask[:, begin:end]]
        for key, x in compare.flatten(str(begin), {**out, "past_key_values": None}):
            found[key] = compare.attended(x, masks).clone()
    return found


@torch.no_grad()
def generate(model: Any, case: Case, cache: str | None = None) -> Outputs:
    """Scores of four steps of greedy generation."""
    torch.manual_seed(0)
    arguments = {k: x for k, x in case.arguments.items() if not k.startswith("decoder_")}
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "num_beams": 1,
    }
    options |= {"num_beams": 1, "pad_token_id": 0, "bos_token_id": 1, "output_scores": True}
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 1
    if cache:
        options["cache_implementation"] = cache
    out = model.generate(**arguments, **options, return_dict_in_generate=True)
    return {f"step {index}": x.clone() for index, x in enumerate(out.scores)}


def first_that_runs(model: Any, family: str) -> Case:
    """Arguments without padding. Raises what the first attempt raised where none runs."""
    first: Exception | None = None
    for arguments in inputs.attempts(model, given(model, family)):
        case = Case("plain", arguments)
        try:
            found = outputs(model, case)
        except Exception as error:  # noqa: BLE001 - the next attempt may run
            first = first or error
            continue
        if any(bool(x.isfinite().any()) for x in found.values()):
            return case
        first = first or ValueError(f"no finite number in the outputs {sorted(found)}")
    raise first or ValueError(f"no inputs known for {list(inputs.signature(model))[1:8]}")


def _cases(model: Any, plain: Case) -> Iterator[Case]:
    """Without padding and with it on either side; with more decoder tokens than the encoder has."""
    yield plain
    last = plain
    for side in ("right", "left"):
        padded = inputs.padded(model, plain.arguments, side)
        if padded:
            last = padded
            yield padded
    if "decoder_input_ids" in plain.arguments and model.config.is_encoder_decoder:
        longer = {**last.arguments, "decoder_input_ids": inputs.ids(inputs.LONGER, seed=1)}
        yield Case("longer", longer, last.masks)


@torch.no_grad()
def _has_cache(model: Any, plain: Case) -> bool:
    names = inputs.signature(model).keys()
    text = {"input_ids", "decoder_input_ids"} & plain.arguments.keys()
    if not text or not {"past_key_values", "use_cache"} & names:
        return False
    try:
        return run(model, plain, use_cache=True).get("past_key_values") is not None
    except Exception:  # noqa: BLE001 - encoders of encoder-decoders say so in many ways
        return False


def measures(model: Any, family: str, whole: bool, note: Callable[[str], None]) -> list[Measure]:
    """Everything that is measured of a model; of those after a family's first less: forward
    passes and generation."""
    plain = first_that_runs(model, family)
    right, left = (inputs.padded(model, plain.arguments, side) for side in ("right", "left"))
    cases = list(_cases(model, plain)) if whole else [plain, *([right] if right else [])]
    if whole or model.can_generate():
        try:
            image = inputs.with_images(model)
        except Exception as error:  # noqa: BLE001 - said in the table
            note(f"image ({type(error).__name__}: {error})")
        else:
            cases += [image] if image else []
    found = [Measure(case.name, outputs, case) for case in cases]
    if whole and _has_cache(model, plain):
        found.append(Measure("steps", steps, left or plain))
    if model.can_generate():
        prompt = (right if model.config.is_encoder_decoder else left) or plain
        for name, cache in (("generate", None), ("static", "static")):
            take = partial(generate, cache=cache)
            found.append(Measure(name, take, prompt, compare.step_difference))
    if whole:
        found.append(Measure("gradient", gradients, right or plain, compare.gradient_difference))
    return found
