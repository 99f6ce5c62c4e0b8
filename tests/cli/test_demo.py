"""The demo on a tiny base and a few rows: every step is made and everything is where it says."""

from __future__ import annotations

import json

import pytest

from lora.cli.demo import SETTINGS
from lora.model.loading import load


@pytest.fixture(autouse=True)
def tiny_demo(base, rows, monkeypatch) -> None:
    embedded = {"base": base, "train.jsonl": rows, "test.jsonl": rows}
    monkeypatch.setattr("lora.assets.asset", lambda room, name: embedded[name])
    for method in ("lora", "head"):
        monkeypatch.setitem(SETTINGS, method, {"epochs": 1, "batch_size": 8})


def test_json_tells_of_every_step(lora, tmp_path) -> None:
    outcome = lora("demo", "-o", tmp_path / "demo", "--json", "-q")
    assert outcome.exit_code == 0
    document = outcome.document
    assert (document["training"]["method"], document["head_only"]["method"]) == ("lora", "head")
    assert document["training"]["total_epochs"] == document["head_only"]["total_epochs"] == 1
    for scores in (document["evaluation"], document["head_only_evaluation"]):
        assert scores["rows"] == 20
        assert scores["majority_baseline"]["accuracy"] == 0.5
    assert len(document["predictions"]) == 3
    assert load(document["merge"]["output"]).head.class_names == ("bad", "good")
    assert load(document["training"]["best_checkpoint"]).is_classifier


def test_text_compares_and_says_where_everything_is(lora, tmp_path) -> None:
    outcome = lora("demo", "-o", tmp_path / "demo")
    assert outcome.exit_code == 0
    for said in ("Macro-F1", "always bad", "head only", "LoRA, rank 16", "Probability"):
        assert said in outcome.out
    for written in ("lora/best", "head-only/best", "merged", "lora/metrics.jsonl"):
        assert str(tmp_path / "demo" / written) in outcome.out
        assert (tmp_path / "demo" / written).exists()


def test_ctrl_c_advises_what_a_demo_has(lora, tmp_path, monkeypatch) -> None:
    def interrupt(self, event) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora.cli.progress.ProgressLines.step_done", interrupt)
    outcome = lora("demo", "-o", tmp_path / "demo")
    assert outcome.exit_code == 130
    assert "resume" not in outcome.err
    assert str(tmp_path / "demo" / "lora" / "last") in outcome.err
    said = "note: a demo cannot go on; begin a new one in another folder with -o, or remove "
    assert f"{said}{tmp_path / 'demo'}\n" in outcome.err


def test_it_is_the_same_twice_and_overwrites_nothing(lora, tmp_path) -> None:
    first, second = (lora("demo", "-o", tmp_path / name, "-q", "--json") for name in ("a", "b"))
    assert first.exit_code == second.exit_code == 0
    assert first.document["evaluation"] == second.document["evaluation"]
    assert json.loads((tmp_path / "a" / "demo.json").read_text()) == first.document
    again = lora("demo", "-o", tmp_path / "a", "-q", "--json")
    assert again.exit_code == 5
    said = "holds an earlier demo (lora, head-only, merged, demo.json); name another folder with -o"
    assert said in again.document["error"]
    (tmp_path / "c" / "merged").mkdir(parents=True)
    assert lora("demo", "-o", tmp_path / "c", "-q").exit_code == 5
    assert list((tmp_path / "c").rglob("*")) == [tmp_path / "c" / "merged"]
