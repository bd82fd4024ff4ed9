"""One family of models: "resformer" held to "eager", and to "sdpa" where it differs from eager."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.families import compare, models
from tests.families.measures import Measure, measures
from tests.integrations.tiny import kernel, transformers

EQUAL, AS_SDPA, UNUSED = "equal", "as sdpa", "not used"
REFUSED, DIFFERENT, ERROR, UNBUILT = "refused", "DIFFERENT", "error", "not built"
WORST_FIRST = (DIFFERENT, ERROR, REFUSED, AS_SDPA, UNUSED, EQUAL, UNBUILT)

Taken = dict[str, Any]
"""Outputs by the name of what is measured, or what it raised."""


class Calls:
    """Counts calls of the registered attention function by the class of the calling module."""

    def __init__(self) -> None:
        self.function = transformers.AttentionInterface()[kernel.NAME]
        self.callers: dict[str, int] = {}

    def __call__(self, module: torch.nn.Module, *tensors: Any, **options: Any) -> Any:
        name = type(module).__name__
        self.callers[name] = self.callers.get(name, 0) + 1
        return self.function(module, *tensors, **options)

    def __enter__(self) -> None:
        transformers.AttentionInterface.register(kernel.NAME, self)

    def __exit__(self, *_: object) -> None:
        transformers.AttentionInterface.register(kernel.NAME, self.function)


@dataclass
class Result:
    """What was found for one model class."""

    family: str
    model: str
    status: str = EQUAL
    detail: str = ""
    sdpa: str = ""
    checks: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    callers: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    """The largest difference that counts as equal, relative to a tensor's largest number."""


def brief(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:240]}"


class Examination:
    """One model class under one implementation after another."""

    def __init__(self, family: str, cls: Any, config: Any, whole: bool) -> None:
        self.cls, self.config, self.whole = cls, config, whole
        self.result = Result(family, cls.__name__)

    def run(self) -> Result:
        result = self.result
        try:
            models.check_size(self.cls, self.config)
            self.eager = models.build(self.cls, self.config, "eager")
            models.stir(self.eager)
            planned = measures(self.eager, result.family, self.whole, result.not_run.append)
            expected = self.take(self.eager, planned)
        except Exception as error:  # noqa: BLE001 - eager fails: there is nothing to hold to it
            result.status, result.detail = UNBUILT, brief(error)
            return result
        self.measures: list[Measure] = []
        self.expected: Taken = {}
        for measure in planned:
            outputs = expected[measure.name]
            if isinstance(outputs, Exception):
                result.not_run.append(f"{measure.name} ({brief(outputs)})")
            else:
                self.measures.append(measure)
                self.expected[measure.name] = outputs
        result.checks = [measure.name for measure in self.measures]
        if not result.checks:
            result.status, result.detail = UNBUILT, "; ".join(result.not_run)
            return result
        result.sdpa = "refused" if models.refusal(self.cls, self.config, "sdpa") else "served"
        self.hold()
        return result

    def model(self, implementation: str) -> Any:
        """The class with the same weights and an implementation."""
        if self.cls._can_set_attn_implementation():
            self.eager.set_attn_implementation(implementation)
            return self.eager
        model = models.build(self.cls, self.config, implementation)
        model.load_state_dict(self.eager.state_dict())
        return model

    def take(self, model: Any, planned: list[Measure]) -> Taken:
        found: Taken = {}
        for measure in planned:
            try:
                found[measure.name] = measure.take(model, measure.case)
            except Exception as error:  # noqa: BLE001 - reported
                found[measure.name] = error
        return found

    def hold(self) -> None:
        result = self.result
        built = models.refusal(self.cls, self.config, kernel.NAME)
        try:
            model = self.model(kernel.NAME)
        except Exception as error:  # noqa: BLE001 - reported
            same = isinstance(error, ValueError) and isinstance(built, ValueError)
            result.status, result.detail = (REFUSED if same else ERROR), brief(error)
            if not same:
                result.detail += f"; when built: {brief(built) if built else 'nothing raised'}"
            return
        calls = Calls()
        with calls:
            found = self.take(model, self.measures)
        result.callers = calls.callers
        wrong: dict[str, str] = {}
        if built:
            wrong["when built"] = brief(built)
        differing: list[Measure] = []
        for measure in self.measures:
            outputs = found[measure.name]
            if isinstance(outputs, Exception):
                wrong[measure.name] = brief(outputs)
                continue
            distance, _ = self.distance(measure, outputs)
            if distance > compare.TOLERANCE:
                differing.append(measure)
            else:
                result.error = max(result.error, distance)
        self.judge(differing, found, wrong)
        if result.status == EQUAL and not calls.callers:
            result.status = UNUSED

    def distance(self, measure: Measure, outputs: Any) -> tuple[float, str]:
        expected: Any = self.expected[measure.name]
        return measure.between(outputs, expected)

    def judge(self, differing: list[Measure], found: Taken, wrong: dict[str, str]) -> None:
        """Whether what differs is rounding, or differs in sdpa too."""
        result = self.result
        notes = [f"{name}: {text}" for name, text in wrong.items()]
        left = [x for x in differing if not self.is_rounding(x, found, self.expected, "eager")]
        if len(left) < len(differing):
            rounded = ", ".join(measure.name for measure in differing if measure not in left)
            notes.append(f"rounding of float32: {rounded}")
        if left and result.sdpa == "served":
            other = self.take(self.model("sdpa"), left)
            excused = [measure for measure in left if self.is_as(measure, found, other)]
            left = [measure for measure in left if measure not in excused]
            if excused:
                result.status = AS_SDPA
                notes.append(f"as sdpa: {', '.join(measure.name for measure in excused)}")
        for measure in left:
            distance, where = self.distance(measure, found[measure.name])
            notes.append(f"{measure.name}: {where} differs by {distance:.1e}")
        if left or wrong:
            result.status = DIFFERENT if left else ERROR
        result.detail = "; ".join(notes)

    def is_as(self, measure: Measure, found: Taken, other: Taken) -> bool:
        mine: Any = found[measure.name]
        theirs: Any = other[measure.name]
        if isinstance(theirs, Exception):
            return False
        if measure.between(mine, theirs)[0] <= compare.TOLERANCE:
            return True
        return self.is_rounding(measure, found, other, "sdpa")

    def is_rounding(self, measure: Measure, found: Taken, other: Taken, name: str) -> bool:
        """Whether the kernel and another implementation agree in float64, and the kernel's float32
        is hardly farther from it than the other's."""
        before = torch.get_default_dtype()
        exact: dict[str, Any] = {}
        try:
            torch.set_default_dtype(torch.float64)
            with compare.Double():
                for each in (name, kernel.NAME):
                    model = copy.deepcopy(self.model(each)).double()
                    exact[each] = measure.take(model, measure.case.double())
        except RuntimeError as error:
            self.result.not_run.append(f"{measure.name} in float64 ({brief(error)})")
            return False
        finally:
            torch.set_default_dtype(before)
        if measure.between(exact[kernel.NAME], exact[name])[0] > compare.EXACT:
            return False
        mine, theirs = (
            measure.between({k: x.double() for k, x in taken[measure.name].items()}, exact[name])[0]
            for taken in (found, other)
        )
        return mine <= 10 * theirs + compare.TOLERANCE


def examine(family: str) -> list[Result]:
    """All classes of a family, the first in every way and the others in one or two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = models.classes(family)[:3]
            configs = [models.config_of(family, cls) for cls in found]
            if not found:
                raise ValueError("no model class")
        except Exception as error:  # noqa: BLE001 - reported
            return [Result(family, "", UNBUILT, brief(error))]
        return [
            Examination(family, cls, config, whole=index == 0).run()
            for index, (cls, config) in enumerate(zip(found, configs, strict=True))
        ]
