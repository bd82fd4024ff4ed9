"""The command line of `train.py`, and what does not go together on it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from resformer_kernels.models import VARIANTS, LanguageModelConfig
from training import FlagError
from training.schedule import SCHEDULES

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("autocast", "fsdp")
ATTENTIONS = ("ours", "sdpa")


@dataclass(frozen=True)
class Options:
    """The flags, by the names they have on the command line."""

    data: Path
    tokenizer: str
    vocab: int
    held_out: float
    prepared: Path | None
    prepare_only: bool
    variant: str
    dim: int
    layers: int
    heads: int
    kv_heads: int | None
    seqlen: int
    field: list[str]
    steps: int
    batch: int
    accumulate: int
    rate: float
    schedule: str
    warmup: int
    decay: float
    final_rate: float
    weight_decay: float
    clip: float
    seed: int
    tensor_parallel: int
    context_parallel: int
    device: str
    dtype: str
    mixed_precision: str
    compile: bool
    checkpointing: bool
    attention: str
    timeout: float
    out: Path
    log_every: int
    validate_every: int
    validation_batches: int
    save_every: int
    keep: int
    save_in_background: bool
    resume: str
    sample: int
    prompt: str
    temperature: float
    compare_sdpa: int

    @property
    def prepared_root(self) -> Path:
        """The folder of prepared texts."""
        return self.out / "data" if self.prepared is None else self.prepared

    def config(self, vocab_size: int) -> LanguageModelConfig:
        """The model's configuration. FlagError where it is none."""
        given: dict[str, Any] = {
            "variant": self.variant,
            "vocab_size": vocab_size,
            "max_seqlen": self.seqlen,
            "dim": self.dim,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "qk_norm": True,
            "checkpointing": self.checkpointing,
        }
        known = {field.name for field in fields(LanguageModelConfig)}
        for text in self.field:
            name, equals, value = text.partition("=")
            if not equals or name not in known:
                raise FlagError(
                    f"--field must be NAME=VALUE with a field of LanguageModelConfig, got {text!r}"
                )
            try:
                given[name] = json.loads(value)
            except json.JSONDecodeError:
                given[name] = value  # a word without quotes
        try:
            return LanguageModelConfig(**given)
        except (TypeError, ValueError) as wrong:
            raise FlagError(str(wrong)) from wrong


class _Help(argparse.HelpFormatter):
    """Names a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        shown = repr(default) if action.dest == "prompt" else "%(default)s"
        return f"{action.help} ({shown})"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py --data PATH [flags]",
        description="Train a language model of any value-residual variant on text, on one process "
        "or, started by torchrun, on many.",
        formatter_class=_Help,
    )
    _data_flags(made.add_argument_group("text"))
    _model_flags(made.add_argument_group("model"))
    _optimiser_flags(made.add_argument_group("optimisation"))
    _machine_flags(made.add_argument_group("machines and precision"))
    _output_flags(made.add_argument_group("output and checkpoints"))
    return made


# argparse's groups have no public name.
def _data_flags(group: Any) -> None:
    group.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="a text file, or a folder of them"
    )
    group.add_argument(
        "--tokenizer", choices=("bytes", "bpe"), default="bytes", help="what a token is"
    )
    group.add_argument(
        "--vocab", type=int, default=4096, metavar="N", help="most tokens of a BPE vocabulary"
    )
    group.add_argument(
        "--held-out", type=float, default=0.1, metavar="SHARE", help="share to validate on"
    )
    group.add_argument(
        "--prepared",
        type=Path,
        metavar="FOLDER",
        help="where prepared tokens are kept, visible to every node; else OUT/data",
    )
    group.add_argument("--prepare-only", action="store_true", help="prepare the text and stop")


def _model_flags(group: Any) -> None:
    group.add_argument(
        "--variant",
        choices=VARIANTS,
        default="learnable",
        metavar="NAME",
        help=f"of the values that a layer attends over: {', '.join(VARIANTS)}",
    )
    group.add_argument("--dim", type=int, default=128, metavar="N", help="channels of the stream")
    group.add_argument("--layers", type=int, default=4, metavar="N", help="blocks")
    group.add_argument("--heads", type=int, default=4, metavar="N", help="query heads")
    group.add_argument(
        "--kv-heads", type=int, metavar="N", help="key and value heads; else as many as --heads"
    )
    group.add_argument("--seqlen", type=int, default=256, metavar="N", help="tokens of a sequence")
    group.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of LanguageModelConfig, such as mlp=relu2; may be repeated",
    )


def _optimiser_flags(group: Any) -> None:
    group.add_argument("--steps", type=int, default=500, metavar="N", help="steps of the optimiser")
    group.add_argument(
        "--batch", type=int, default=8, metavar="N", help="sequences of a step, over all ranks"
    )
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="micro-batches that a step sums up"
    )
    group.add_argument("--rate", type=float, default=3e-3, metavar="X", help="peak learning rate")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the rate")
    group.add_argument("--warmup", type=int, default=50, metavar="N", help="steps up to the peak")
    group.add_argument(
        "--decay", type=float, default=0.2, metavar="SHARE", help="of all steps, how long wsd falls"
    )
    group.add_argument(
        "--final-rate", type=float, default=0.1, metavar="SHARE", help="last rate, of the peak"
    )
    group.add_argument(
        "--weight-decay", type=float, default=0.1, metavar="X", help="of matrices, by AdamW"
    )
    group.add_argument(
        "--clip", type=float, default=1.0, metavar="X", help="largest norm of the gradient"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches")


def _machine_flags(group: Any) -> None:
    group.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share each layer"
    )
    group.add_argument(
        "--context-parallel",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share each sequence; all other ranks are data-parallel",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train"
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the arithmetic")
    group.add_argument(
        "--mixed-precision",
        choices=PRECISIONS,
        default="autocast",
        help="how bfloat16 is reached: autocast, or FSDP gathers and computes in it (half the "
        "bytes sent)",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile each block")
    group.add_argument(
        "--checkpointing", action="store_true", help="recompute each block in the backward pass"
    )
    group.add_argument(
        "--attention",
        choices=ATTENTIONS,
        default="ours",
        help="sdpa: mix in PyTorch operations, then its scaled_dot_product_attention",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a rank waits for the others before it stops with an error",
    )


def _output_flags(group: Any) -> None:
    group.add_argument(
        "--out",
        type=Path,
        default=Path("reports/train"),
        metavar="FOLDER",
        help="of all that is written",
    )
    group.add_argument("--log-every", type=int, default=10, metavar="N", help="steps between lines")
    group.add_argument(
        "--validate-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between validations; 0: at the end alone",
    )
    group.add_argument(
        "--validation-batches", type=int, default=8, metavar="N", help="of --batch sequences each"
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between checkpoints; 0: none",
    )
    group.add_argument("--keep", type=int, default=3, metavar="N", help="checkpoints that stay")
    group.add_argument(
        "--save-in-background", action="store_true", help="train on while a checkpoint is written"
    )
    group.add_argument(
        "--resume",
        default="no",
        metavar="no|auto|FOLDER",
        help="auto: from the newest checkpoint of OUT, if there is one; or from a checkpoint",
    )
    group.add_argument(
        "--sample", type=int, default=200, metavar="N", help="tokens to write at the end; 0: none"
    )
    group.add_argument("--prompt", default="\n", metavar="TEXT", help="what they continue")
    group.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="of sampling; 0: greedy"
    )
    group.add_argument(
        "--compare-sdpa",
        type=int,
        default=0,
        metavar="N",
        help="do not train: time N steps with each attention in turn",
    )


def check(options: Options, world: int) -> None:
    """FlagError, naming the flag, where the flags do not go together on `world` ranks."""
    _check_ranges(options)
    context, tensor = options.context_parallel, options.tensor_parallel
    if world % (context * tensor):
        raise FlagError(
            f"--tensor-parallel {tensor} times --context-parallel {context} must divide the number "
            f"of ranks, {world}"
        )
    data = world // (context * tensor)
    if options.batch % (data * options.accumulate):
        raise FlagError(
            f"--batch must be a multiple of --accumulate {options.accumulate} times {data} "
            f"data-parallel ranks, got {options.batch}"
        )
    if context > 1 and options.seqlen % (2 * context):
        raise FlagError(
            f"--seqlen must be a multiple of 2 x --context-parallel = {2 * context}, so that each "
            f"rank gets an early and a late part of every sequence, got {options.seqlen}"
        )
    heads = options.heads if options.kv_heads is None else options.kv_heads
    if heads % tensor:
        raise FlagError(
            f"--tensor-parallel must divide the {heads} key and value heads (--kv-heads, --heads), "
            f"got {tensor}"
        )
    sdpa = options.attention == "sdpa" or options.compare_sdpa
    if sdpa and context > 1:
        raise FlagError("--attention sdpa and --compare-sdpa need --context-parallel 1")
    if options.mixed_precision == "fsdp" and (options.dtype != "bfloat16" or world == 1):
        raise FlagError("--mixed-precision fsdp needs --dtype bfloat16 and two ranks or more")


def _check_ranges(options: Options) -> None:
    least = {
        **dict.fromkeys(("steps", "batch", "accumulate", "tensor_parallel", "context_parallel"), 1),
        **dict.fromkeys(("dim", "layers", "heads", "seqlen", "log_every", "keep"), 1),
        **dict.fromkeys(("warmup", "validate_every", "save_every", "sample", "seed"), 0),
        **dict.fromkeys(("compare_sdpa",), 0),
        "validation_batches": 1,
        "vocab": 257,
    }
    for name, bound in least.items():
        if getattr(options, name) < bound:
            flag = name.replace("_", "-")
            raise FlagError(f"--{flag} must be at least {bound}, got {getattr(options, name)}")
    if options.kv_heads is not None and (options.kv_heads < 1 or options.heads % options.kv_heads):
        raise FlagError(f"--kv-heads must divide --heads {options.heads}, got {options.kv_heads}")
    if options.vocab > 2**16:
        raise FlagError(f"--vocab must be at most 65536, got {options.vocab}")
    for name in ("held_out", "decay", "final_rate"):
        if not 0.0 <= getattr(options, name) <= 1.0:
            flag = name.replace("_", "-")
            raise FlagError(f"--{flag} must be from 0 to 1, got {getattr(options, name)}")
    for name in ("rate", "clip", "timeout"):
        if not getattr(options, name) > 0.0:
            raise FlagError(f"--{name} must be above 0, got {getattr(options, name)}")
    for name in ("weight_decay", "temperature"):
        if not getattr(options, name) >= 0.0:
            flag = name.replace("_", "-")
            raise FlagError(f"--{flag} must be 0 or more, got {getattr(options, name)}")


def parse(arguments: Sequence[str] | None) -> Options:
    """The options. Exits with a message, as argparse does, where a flag is unknown."""
    return Options(**vars(parser().parse_args(arguments)))
