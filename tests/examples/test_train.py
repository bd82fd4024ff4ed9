"""`examples/train.py`: the order of the data, layouts of ranks, checkpoints and flags."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from resformer_kernels.models import LanguageModel, LanguageModelConfig
from tests.distributed import ranks

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SMALL = (
    *("--dim", "32", "--layers", "3", "--heads", "4", "--kv-heads", "2", "--seqlen", "32"),
    *("--batch", "4", "--steps", "10", "--save-every", "4", "--keep", "2", "--log-every", "5"),
    *("--validate-every", "0", "--validation-batches", "2", "--sample", "8", "--timeout", "60"),
    # A rate that does not depend on the number of steps.
    *("--warmup", "0", "--final-rate", "1"),
)
LAYOUTS = {
    "sharded": ("--accumulate", "2"),
    "context": ("--context-parallel", "2", "--checkpointing"),
    "tensor": ("--tensor-parallel", "2", "--save-in-background"),
}


def part(name: str) -> Any:
    """A module of the example, as for a script that is run."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def train_all(runs: list[list[str]]) -> str:
    """Run the example on this rank, several times; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for flags in runs:
            part("train").main(flags)
    return printed.getvalue()


class Trained(NamedTuple):
    """Where runs are that were made once for all tests here."""

    folder: Path
    printed: str
    """By the run of one process."""
    flags: Callable[..., list[str]]

    def losses(self, name: str) -> list[float]:
        """A run's losses, the validation's last."""
        text = (self.folder / name / "metrics.jsonl").read_text()
        found = [json.loads(line) for line in text.splitlines()]
        assert [x["step"] for x in found] == [*range(1, 11), 10]
        return [x["loss"] for x in found[:-1]] + [found[-1]["validation_loss"]]

    def checkpoints(self, name: str) -> list[str]:
        """The names of a run's checkpoints."""
        return sorted(p.name for p in (self.folder / name / "checkpoints").iterdir())


def write_text(path: Path) -> None:
    draw = random.Random(0)
    words = ["the", "value", "of", "a", "layer", "is", "kept", "and", "read", "again"]
    lines = (" ".join(draw.choices(words, k=8)) for _ in range(400))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The same training on one process and on two, laid out in each way."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "text.txt")

    def flags(name: str, *more: str) -> list[str]:
        paths = ("--data", folder / "text.txt", "--prepared", folder / "data")
        return [*map(str, (*paths, "--out", folder / name)), *SMALL, *more]

    printed = train_all([flags("one")])
    ranks.run(2, train_all, [flags(name, *more) for name, more in LAYOUTS.items()])
    return Trained(folder, printed, flags)


def test_two_ranks_learn_what_one_learns(trained: Trained) -> None:
    alone = trained.losses("one")
    assert alone[-1] < alone[0] - 0.5
    for name in LAYOUTS:
        assert trained.losses(name) == pytest.approx(alone, abs=1e-4), name


def test_a_run_tells_what_it_does(trained: Trained) -> None:
    for told in ("1 rank on cpu", "step  5/10  loss", "validation", "tokens/s", "model.pt"):
        assert told in trained.printed
    stored = torch.load(trained.folder / "sharded" / "model.pt")
    model = LanguageModel(LanguageModelConfig(**stored["config"]))
    model.load_state_dict(stored["state"])


def test_the_newest_checkpoints_are_kept(trained: Trained) -> None:
    for name in ("one", *LAYOUTS):
        assert trained.checkpoints(name) == ["step-00000008", "step-00000010"]


def test_a_checkpoint_of_two_ranks_resumes_on_one(trained: Trained) -> None:
    for name in ("sharded", "tensor"):
        resumed = f"{name}-resumed"
        shutil.copytree(trained.folder / name, trained.folder / resumed)
        shutil.rmtree(trained.folder / resumed / "checkpoints" / "step-00000010")
        printed = train_all([trained.flags(resumed, "--resume", "auto")])
        assert "resumed after step 8" in printed
        assert trained.losses(resumed)[:8] == trained.losses(name)[:8]
        assert trained.losses(resumed) == pytest.approx(trained.losses(name), abs=1e-4)


def start_rank(rank: int, port: int, flags: list[str]) -> subprocess.Popen[str]:
    """A rank of two, as torchrun starts it."""
    about = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(FOLDER / "train.py"), *flags],
        env={**os.environ, **about, **meeting},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_resumes_bit_for_bit(trained: Trained) -> None:
    folder = trained.folder / "killed"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = trained.flags("killed", *LAYOUTS["sharded"], "--steps", "100000", "--keep", "1000")
    started = [start_rank(rank, port, flags) for rank in range(2)]
    try:
        until = time.monotonic() + 60
        while not (folder / "checkpoints" / "step-00000004").exists():
            assert time.monotonic() < until
            assert started[0].poll() is None
            time.sleep(0.02)
        started[1].send_signal(signal.SIGKILL)
        _, errors = started[0].communicate(timeout=60)
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    assert started[0].returncode not in (0, -signal.SIGKILL)
    assert "Error" in errors
    # What a rank leaves that is killed while it writes; and had it been killed sooner.
    (folder / "checkpoints" / "step-00000099.part").mkdir()
    for later in sorted((folder / "checkpoints").glob("step-????????"))[1:]:
        shutil.rmtree(later)
    ranks.run(2, train_all, [trained.flags("killed", *LAYOUTS["sharded"], "--resume", "auto")])
    assert trained.losses("killed") == trained.losses("sharded")
    assert trained.checkpoints("killed") == ["step-00000008", "step-00000010"]


def test_batches_are_those_of_any_number_of_ranks(tmp_path: Path) -> None:
    data, text = part("training.data"), part("training.text")
    write_text(tmp_path / "text.txt")
    source = text.Source(tmp_path / "text.txt", "bytes", 4096, 0.1)
    told: list[str] = []
    whole, cut = (
        text.prepare(source, tmp_path / name, told.append, limit=limit)
        for name, limit in (("whole", 2**20), ("cut", 100))
    )
    assert text.prepare(source, tmp_path / "cut", told.append) == cut
    assert len(told) == 4
    batches = []
    for folder in (whole, cut):
        found = data.Tokens(folder, text.describe(folder), "train")
        batches.append(data.Batches(found, data.Order(len(found), 32, seed=3), 8))
    assert len(list(cut.glob("train-*.bin"))) > 100
    for step in (0, 41, 1000):
        rows = batches[0].rows(step, 0, 8)
        assert rows.shape == (8, 33)
        assert rows.equal(torch.cat([batches[1].rows(step, r, r + 2) for r in (0, 2, 4, 6)]))
    original = (tmp_path / "text.txt").read_bytes()
    assert bytes(rows[5].tolist()) in original


def test_a_pass_takes_every_window_once() -> None:
    order = part("training.data").Order(tokens=1000, length=7, seed=1)
    passes = [order.starts(np.arange(order.windows) + n * order.windows) for n in range(3)]
    for starts in passes:
        assert len(set(starts.tolist())) == order.windows == 141
        assert set(np.diff(np.sort(starts)).tolist()) == {7}
        assert starts.min() >= 0
        assert starts.max() + 7 < 1000
        assert not np.array_equal(starts, np.sort(starts))
    assert len({tuple(starts.tolist()) for starts in passes}) == 3
    straddling = order.starts(np.arange(100, 200))
    assert straddling.tolist() == [*passes[0][100:], *passes[1][:59]]
    with pytest.raises(ValueError, match="--seqlen"):
        part("training.data").Order(tokens=7, length=7, seed=1)


def test_files_of_a_folder_are_split_whole(tmp_path: Path) -> None:
    text = part("training.text")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / ".hidden").write_text("never")
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"<{number}>")
    source = text.Source(tmp_path / "texts", "bytes", 4096, 0.2)
    folder = text.prepare(source, tmp_path, lambda _: None)
    train, held_out = ((folder / f"{x}-00000.bin").read_text() for x in text.SPLITS)
    assert sorted((train + held_out).split()) == sorted(f"<{n}>" for n in range(40))
    assert 0 < len(held_out.split()) < 20
    (tmp_path / "texts" / "0.txt").write_text("changed")
    assert text.prepared_folder(source, tmp_path) != folder
    with pytest.raises(ValueError, match="--data"):
        text.prepare(text.Source(tmp_path / "none", "bytes", 4096, 0.2), tmp_path, lambda _: None)


def test_byte_pairs_read_what_they_wrote(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    text = part("training.text")
    write_text(tmp_path / "text.txt")
    source = text.Source(tmp_path / "text.txt", "bpe", 300, 0.1)
    folder = text.prepare(source, tmp_path, lambda _: None)
    description = text.describe(folder)
    assert 256 < description.vocab_size <= 300
    assert description.dtype == "uint16"
    tokens = part("training.data").Tokens(folder, description, "train")
    decoded = text.open_tokenizer(folder, "bpe").decode(tokens.read(0, len(tokens)).tolist())
    assert (tmp_path / "text.txt").read_text().startswith(decoded)
    assert len(tokens) < len(decoded) / 2


def test_the_rate_follows_its_schedule() -> None:
    schedule = part("training.schedule").Schedule
    cosine = schedule("cosine", 2.0, steps=110, warmup=10, decay=0.2, final=0.1)
    wsd = schedule("wsd", 2.0, steps=110, warmup=10, decay=0.5, final=0.0)
    assert [cosine.rate(x) for x in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [cosine.rate(x) for x in (10, 60, 110)] == pytest.approx([2.0, 1.1, 0.2])
    assert [wsd.rate(x) for x in (9, 55, 99)] == pytest.approx([2.0, 2.0, 0.4])


@pytest.mark.parametrize(
    ("variant", "more"),
    [
        ("learnable-plus", {"window_pattern": "SL", "short_window": 5, "num_kv_heads": 2}),
        ("dense", {}),
        ("fused-kv-lite", {}),
        ("value-embedding", {}),
        ("svformer", {"attention_scale": 0.3}),
    ],
)
def test_the_peer_computes_the_same(variant: str, more: dict[str, Any]) -> None:
    config = LanguageModelConfig(variant, max_seqlen=20, dim=32, num_layers=3, **more)
    ids = torch.randint(config.vocab_size, (2, 20))
    found = []
    for peer in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(config)
        if peer:
            part("training.attention").use_sdpa(model)
        loss = model(ids, ids)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    gated = LanguageModel(LanguageModelConfig(dim=32, gate="head"))
    with pytest.raises(ValueError, match="--attention sdpa"):
        part("training.attention").use_sdpa(gated)


def test_both_attentions_are_timed(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    part("train").main(trained.flags("timed", "--compare-sdpa", "2"))
    printed = capsys.readouterr().out
    assert "ours / sdpa" in printed
    assert printed.count("tokens/s") == 2


@pytest.mark.parametrize(
    ("flags", "world", "named"),
    [
        (("--tensor-parallel", "3"), 4, "--tensor-parallel 3"),
        (("--context-parallel", "2", "--seqlen", "34"), 2, "--seqlen"),
        (("--batch", "6", "--accumulate", "2"), 2, "--batch"),
        (("--tensor-parallel", "4"), 4, "--kv-heads"),
        (("--context-parallel", "2", "--attention", "sdpa"), 2, "--attention sdpa"),
        (("--mixed-precision", "fsdp"), 2, "--dtype bfloat16"),
        (("--kv-heads", "3"), 1, "--kv-heads"),
        (("--steps", "0"), 1, "--steps"),
        (("--vocab", "100000"), 1, "--vocab"),
        (("--held-out", "2"), 1, "--held-out"),
        (("--final-rate", "2"), 1, "--final-rate"),
        (("--clip", "0"), 1, "--clip"),
    ],
)
def test_flags_that_do_not_go_together(flags: tuple[str, ...], world: int, named: str) -> None:
    options = part("training.options")
    parsed = options.parse(["--data", "text.txt", *SMALL, *flags])
    with pytest.raises(ValueError, match=named):
        options.check(parsed, world)


def test_a_refused_run_says_why(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more, said in (
        ("none", ("--field", "depth=3"), "--field must be NAME=VALUE"),
        ("none", ("--field", "mlp=gelu"), "mlp must be 'swiglu' or 'relu2'"),
        ("none", ("--prompt", "x" * 33), "--prompt must have from 1 to --seqlen 32"),
        ("none", ("--resume", "nowhere"), "--resume: nowhere is not a finished checkpoint"),
        ("one", ("--seed", "1", "--resume", "auto"), "has --seed 0, and this run has 1"),
        ("one", ("--resume", "nowhere"), "holds the checkpoint step-00000010 already"),
        ("one", (), "--resume auto, or name another folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            part("train").main(trained.flags(name, *more))
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
