"""The examples run from end to end at a tiny size."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from resformer_kernels.tasks import load_corpus

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SAID = ("Oh no!", "What is it?", "I lost it all.", "You are a genius!", "Thank you.", "Bye.")
HEADER = "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID,Season,Episode\n"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example whose name is the parameter, imported as a module."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(FOLDER)  # as for a script that is run
    return importlib.import_module(request.param)


@pytest.mark.parametrize("example", ["reservoir_tasks"], indirect=True)
def test_reservoir_tasks(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for task in ("NARMA-10", "Mackey-Glass", "Lorenz"):
        assert task in printed
    assert len(list(tmp_path.glob("*.png"))) == 6
    with pytest.raises(SystemExit):
        example.main(["--task", "chess"])


@pytest.mark.parametrize("example", ["reservoir_tasks"], indirect=True)
def test_reservoir_tasks_beside_reservoirpy(example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("reservoirpy")
    stored = tmp_path / "stored.json"
    options = ["--quick", "--seeds", "2", "--task", "narma", "--out", str(tmp_path)]
    example.main([*options, "--peer", "reservoirpy", "--json", str(stored)])
    (task,) = json.loads(stored.read_text())["tasks"]
    same = task["peers"]["ReservoirPy, settings as here"]
    assert len(task["by_seed"]) == len(same["by_seed"]) == 2
    # The same series, and a comparable network.
    assert same["mean_and_spread"][0] == pytest.approx(task["mean_and_spread"][0], rel=1)


@pytest.mark.parametrize("example", ["reservoir_tasks"], indirect=True)
def test_reservoir_tasks_without_reservoirpy(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit):
        example.main(["--quick", "--peer", "reservoirpy"])
    assert "ReservoirPy is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("example", ["reservoir_networks"], indirect=True)
def test_reservoirpy_fed_back_takes_its_own_steps(example: ModuleType) -> None:
    pytest.importorskip("reservoirpy")
    settings = {"sr": 0.9, "lr": 0.6, "input_scaling": 0.5, "bias_scaling": 0.5}
    _, same = example.reservoirpy()
    network = same.make(20, 2, 0, settings)
    state = network.states(torch.randn(30, 2))[-1:]
    outputs = network.free_run(lambda h: h[:, :2], state, 4)
    fresh = same.make(20, 2, 0, settings)
    h = torch.from_numpy(fresh.node._step({"out": state[0].numpy()}, outputs[0, 0].numpy())["out"])
    torch.testing.assert_close(outputs[0, 1], h[:2])


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    for split in ("train", "dev", "test"):
        rows = [
            f'"{SAID[(3 * d + u) % 6]}",{("Ross", "Joey")[u % 2]},{("joy", "anger")[(d + u) % 2]},'
            f"{d},{u},1,1\n"
            for d in range(6)
            for u in range(2 + d % 3)
        ]
        (folder / f"{split}.csv").write_text(HEADER + "".join(rows), encoding="utf-8")


@pytest.mark.parametrize("example", ["dialogue_emotion"], indirect=True)
def test_dialogue_emotion(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "tiny")
    options = ["--seeds", "2", "--epochs", "2", "--units", "8", "--encoder", "trigrams"]
    paths = ["--data", str(tmp_path / "tiny"), "--out", str(tmp_path)]
    stored = tmp_path / "stored.json"
    example.main([*options, *paths, "--json", str(stored), "--score", "test"])
    printed = capsys.readouterr().out
    assert "tiny: test, 2 seeds" in printed
    assert (tmp_path / "tiny-confusion.png").stat().st_size > 1000
    found = json.loads(stored.read_text())
    assert found["settings"]["units"] == 8
    corpus = found["corpora"]["tiny"]
    assert len(corpus["reservoir"]["weighted_f1"]) == 2
    sizes = [corpus[name]["parameters"] for name in example.MODELS]
    assert sizes[0] == pytest.approx(sizes[2], rel=0.02)
    assert sizes[1] == sizes[2]
    (tmp_path / "tiny" / "test.csv").write_text(HEADER + '"Hm",Ross,joy,0,0,1,1\n')
    for part in ("dev", "cv"):
        example.main([*options, *paths, "--score", part])
        assert f"tiny: {part}, 2 seeds" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        example.main([*paths, "--units", "6"])


@pytest.mark.parametrize("example", ["dialogue_parts"], indirect=True)
def test_cross_validation_scores_each_conversation_once(
    example: ModuleType, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "tiny")
    corpus = load_corpus(tmp_path / "tiny")
    pool = [*corpus.train, *corpus.dev]
    sizes = {s: sum(len(d.utterances) for d in getattr(corpus, s)) for s in ("train", "dev")}
    ids = torch.arange(sum(sizes.values()), dtype=torch.float32)[:, None]
    vectors = dict(zip(sizes, ids.split(list(sizes.values())), strict=True))
    owner = [id(d) for d in pool for _ in d.utterances]
    scored: list[int] = []
    for dialogues, found in example.rounds(corpus, vectors, "cv", 3):
        assert len(dialogues["train"]) + len(dialogues["scored"]) == len(pool)
        for part, some in dialogues.items():
            # Each utterance has its own vector.
            wanted = [id(d) for d in some for _ in d.utterances]
            assert [owner[int(i)] for i in found[part][:, 0]] == wanted
        scored += found["scored"][:, 0].int().tolist()
    assert sorted(scored) == list(range(len(ids)))
    (once,) = example.rounds(corpus, vectors, "dev", 3)
    assert once.dialogues["scored"] == list(corpus.dev)
    assert once.vectors["train"] is vectors["train"]


@pytest.mark.parametrize("example", ["dialogue_parts"], indirect=True)
def test_first_scores_do_not_know_their_own_labels(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = example.Settings(strength=1.0, folds=3)
    lengths = torch.tensor([3, 4, 5, 4, 3, 5])
    count = int(lengths.sum())
    part = example.Part(
        torch.randn(count, 4, generator=generator),
        torch.ones(count, 1),
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count) % 2,
        lengths,
        torch.empty(count, 0),
    )
    before = example.score({"train": part, "scored": part}, 2, settings)
    own = part.conversations == 1
    part.labels[own] = 1 - part.labels[own]
    after = example.score({"train": part, "scored": part}, 2, settings)
    changed = {name: (after[name].scores - before[name].scores).abs().amax(1) for name in after}
    # Conversations 1 and 4 are in one fold.
    assert changed["train"][own | (part.conversations == 4)].max() < 1e-6
    assert changed["train"][part.conversations == 0].max() > 1e-3
    assert changed["scored"][own].max() > 1e-3


@pytest.mark.parametrize("example", ["dialogue_parts"], indirect=True)
def test_reservoirs_hold_the_past_of_the_same_conversation_alone(
    example: ModuleType, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "tiny")
    corpus = load_corpus(tmp_path / "tiny")
    settings = example.Settings(components=16, units=8, strength=1.0)
    vectors = {
        split: example.trigrams([t for d in getattr(corpus, split) for t in d.utterances])
        for split in ("train", "dev")
    }
    parts = {
        split: example.arrange(getattr(corpus, split), found, corpus, settings)
        for split, found in example.components(vectors, 16).items()
    }
    parts = example.score(parts, 2, settings)
    second = int(parts["dev"].lengths[0])  # the second conversation's first utterance
    changes = {}
    for reset in (False, True):
        before = example.memories(parts, 0, settings, reset=reset)["dev"]
        parts["dev"].scores[second] += 1.0
        after = example.memories(parts, 0, settings, reset=reset)["dev"]
        parts["dev"].scores[second] -= 1.0
        changes[reset] = (before - after).abs().amax(1) > 1e-4
    behind = torch.arange(len(changes[True])) - second
    length = int(parts["dev"].lengths[1])
    assert changes[False].equal((behind > 0) & (behind < length))
    assert changes[True].equal(behind == 0)


@pytest.mark.parametrize("example", ["speedrun_layer"], indirect=True)
def test_speedrun_layer(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """One call and separate passes agree in every gradient, also where windows cut documents."""
    small = ["--tokens", "90", "--documents", "4", "--window", "9", "--dim", "48", "--heads", "3"]
    example.main([*small, "--repeats", "1"])
    printed = capsys.readouterr().out
    differences = dict(re.findall(r"  (\S+) +(\d\.\de[-+]\d+)\n", printed))
    assert {"loss", "x", "alpha", "value_embedding.weight", "out_gate.weight"} <= set(differences)
    assert all(float(x) < 1e-12 for x in differences.values())
    assert "ratio" in printed
