"""Changes to a model of transformers in place: all of them or none, and beneath accelerate's hooks.

On a module that it has dispatched (`device_map`, offloading) accelerate sets `_hf_hook`; `forward`,
which calls the hook; and `_old_forward`, a method of the module's class at that time, which the
hook calls. Where weights are offloaded they are on the meta device, and the hook moves them to its
`execution_device` for the time of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Within it the modules of `model` may change their class, attributes and contents. An
    exception undoes all of that."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    contents = [
        (held, dict(held))
        for *_, attributes in before
        for held in attributes.values()
        if isinstance(held, dict)
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            object.__setattr__(module, "__class__", cls)
            vars(module).clear()
            vars(module).update(attributes)
        for held, items in contents:
            held.clear()
            held.update(items)
        raise


def change_class(module: nn.Module, name: str, stock: Any, new: Any) -> None:
    """Make a module of class `stock`, called `name` in errors, one of class `new`.

    Raises:
        TypeError: it has another class; its instance has a `forward` which would go on calling
            `stock`'s, other than by a hook of accelerate; or its hook also loads the weights of its
            submodules, of which there will be others.
    """
    if type(module) is not stock:
        raise TypeError(
            f"{name} must be a {stock.__name__}, got {type(module).__name__}: convert the model "
            "before its layers are wrapped, sharded or replaced"
        )
    if any(offloads(hook) and hook.place_submodules for hook in hooks(module)):
        raise TypeError(
            f"{name} has a hook of accelerate which loads its submodules' weights "
            "(preload_module_classes): convert the model before it is dispatched"
        )
    forwards = {} if new.forward is stock.forward else _forwards(module, name, stock, new)
    module.__class__ = new
    vars(module).update(forwards)


def _forwards(module: Any, name: str, stock: Any, new: Any) -> dict[str, Any]:
    """What of the instance calls the forward of class `stock`, calling that of `new` instead."""
    own = vars(module)
    if "forward" not in own:
        return {}
    outer, bound = own["forward"], new.forward.__get__(module)
    if _is_bound(outer, stock.forward, module):
        return {"forward": bound}  # As accelerate leaves a module whose hook it removes.
    hooked = isinstance(outer, functools.partial) and outer.func.__module__ == "accelerate.hooks"
    if not hooked or not _is_bound(own.get("_old_forward"), stock.forward, module):
        raise TypeError(
            f"{name} has a forward of its own, {outer!r}, which would go on calling that of "
            f"{stock.__name__}: convert the model before its forward is replaced"
        )
    outer = functools.update_wrapper(functools.partial(outer.func, module), bound)
    return {"forward": outer, "_old_forward": bound}


def _is_bound(method: Any, function: Any, module: nn.Module) -> bool:
    owner = getattr(method, "__self__", None)
    return owner is module and getattr(method, "__func__", None) is function


def hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on a module itself; a sequence of them as its members."""
    found: list[Any] = []
    waiting = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop()
        inner = getattr(hook, "hooks", None)
        if inner is not None:
            waiting.extend(inner)
        elif hook is not None:
            found.append(hook)
    return found


def offloads(hook: Any) -> bool:
    """Whether a hook of accelerate keeps weights elsewhere between calls."""
    return getattr(hook, "offload", False) is True


def device_of(*modules: nn.Module) -> torch.device:
    """The device for new tensors of the first of these modules: that of its first parameter or
    buffer, or to which that is moved where it is offloaded. Of the next where a module has none."""
    for module in chain.from_iterable(outer.modules() for outer in modules):
        parts = module.parameters(recurse=False), module.buffers(recurse=False)
        for tensor in chain.from_iterable(parts):
            if tensor.device.type != "meta":
                return tensor.device
            targets = [hook.execution_device for hook in hooks(module) if offloads(hook)]
            return torch.device(targets[0]) if targets else tensor.device
    return torch.get_default_device()
