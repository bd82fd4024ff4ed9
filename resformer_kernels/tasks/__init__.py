"""Benchmark tasks for reservoirs: time series, dialogues, and scores."""

from resformer_kernels.tasks.dialogues import Dialogue, DialogueCorpus, load_corpus, read_dialogues
from resformer_kernels.tasks.scores import (
    accuracy,
    bootstrap_difference,
    confusion,
    mean_and_spread,
    memory_capacity,
    nmse,
    nrmse,
    sign_flip_probability,
    valid_steps,
    weighted_f1,
)
from resformer_kernels.tasks.series import (
    LORENZ_EXPONENT,
    delays,
    lorenz,
    mackey_glass,
    narma10,
)

__all__ = [
    "LORENZ_EXPONENT",
    "Dialogue",
    "DialogueCorpus",
    "accuracy",
    "bootstrap_difference",
    "confusion",
    "delays",
    "load_corpus",
    "lorenz",
    "mackey_glass",
    "mean_and_spread",
    "memory_capacity",
    "narma10",
    "nmse",
    "nrmse",
    "read_dialogues",
    "sign_flip_probability",
    "valid_steps",
    "weighted_f1",
]
