"""The examples run from end to end at a tiny size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
SAID = ("Oh no!", "What is it?", "I lost it all.", "You are a genius!", "Thank you.", "Bye.")
HEADER = "Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID,Season,Episode\n"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example whose name is the parameter, imported as a module."""
    pytest.importorskip("matplotlib")
    name: str = request.param
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, name, module)  # its dataclasses look themselves up there
    specification.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize("readout", ["mlp", "attention"])
@pytest.mark.parametrize("example", ["dialogue_emotion"], indirect=True)
def test_dialogue_emotion(
    example: ModuleType, readout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "tiny")
    options = ["--seeds", "2", "--epochs", "2", "--units", "8", "--encoder", "trigrams"]
    paths = ["--data", str(tmp_path / "tiny"), "--out", str(tmp_path)]
    example.main([*options, *paths, "--readout", readout])
    printed = capsys.readouterr().out
    assert "with reservoir" in printed
    assert "95% of resampled" in printed
    assert (tmp_path / "tiny-confusion.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        example.main([*paths, "--units", "6"])


@pytest.mark.parametrize("example", ["dialogue_emotion"], indirect=True)
def test_both_models_have_the_same_size_and_the_past_reaches_only_one(
    example: ModuleType, tmp_path: Path
) -> None:
    write_corpus(tmp_path / "tiny")
    corpus = example.load_corpus(tmp_path / "tiny")
    vectors = {
        split: example.trigrams([t for d in getattr(corpus, split) for t in d.utterances])
        for split in ("train", "dev", "test")
    }
    part = example.prepare(corpus, vectors)["test"]
    with_memory = example.build(part, 2, 8, "mlp", 0).eval()
    without = example.widened(part, 2, example.parameters(with_memory)).eval()
    sizes = [example.parameters(model) for model in (with_memory, without)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    before = [example.logits_of(model, part)[:, 1] for model in (with_memory, without)]
    part.heard[:, 0] += 1.0
    after = [example.logits_of(model, part)[:, 1] for model in (with_memory, without)]
    assert not before[0].equal(after[0])
    assert before[1].equal(after[1])
