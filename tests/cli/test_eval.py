"""Scores from the command line, for adapters, merges and language models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lora.errors import LoraWarning
from lora.io.lora_config import LoraConfig
from lora.model.loading import load
from lora.train.evaluate import evaluate, read_examples_for
from lora.train.finetune import finetune
from lora.train.model_card import model_card
from tests.cli.conftest import LABELLED
from tests.data.files import write_jsonl

KNOWN = [{"instruction": "Up?", "response": "yes"}]


def test_json_holds_every_score_of_the_library(lora, adapter, rows) -> None:
    outcome = lora("eval", adapter, "--data", rows, "--json")
    assert (outcome.exit_code, outcome.err) == (0, "")
    model = load(adapter)
    scores = evaluate(model, read_examples_for(model, rows, 512)).as_dict()
    document = outcome.document
    assert (document["status"], document["task"], document["truncated_rows"]) == ("evaluated", "classify", 0)
    assert {name: document[name] for name in scores} == json_values(scores)


def json_values(value):
    """Return `value` with its tuples as the lists that JSON makes of them."""
    if isinstance(value, dict):
        return {name: json_values(item) for name, item in value.items()}
    return [json_values(item) for item in value] if isinstance(value, tuple) else value


def test_text_shows_each_class_and_the_baseline(lora, adapter, rows) -> None:
    outcome = lora("eval", adapter, "--data", rows)
    assert outcome.exit_code == 0
    for said in (
        "Precision",
        "Recall",
        "F1",
        "Support",
        "Confusion matrix",
        "Accuracy:",
        "Macro-F1:",
        "(10 bins)",
    ):
        assert said in outcome.out
    assert "accuracy 0.5000, macro-F1 0.3333 (always bad)" in outcome.out


def test_a_long_class_name_leaves_room_for_its_scores(lora, base, tmp_path) -> None:
    labels = ("a" * 200, "two\nlines")
    rows = [{"input": f"text {i}", "label": labels[i % 2]} for i in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = finetune(base, data, output=tmp_path / "run", epochs=1, rank=1)
    table = lora("eval", run.best, "--data", data).out.split("Confusion")[0].splitlines()
    assert [line.split()[-1] for line in table[2:4]] == ["4", "4"]
    assert "a..." in table[2]
    assert "two\\nlines" in table[3]


def test_a_file_of_one_class_is_scored_by_the_names_of_the_adapter(lora, adapter, tmp_path) -> None:
    only_good = [row for row in LABELLED if row["label"] == "good"]
    data = write_jsonl(tmp_path / "good.jsonl", only_good)
    support = {
        score["name"]: score["support"]
        for score in lora("eval", adapter, "-d", data, "--json").document["per_class"]
    }
    assert support == {"bad": 0, "good": 10}


def test_a_language_model_is_scored_by_its_loss(lora, base, texts) -> None:
    document = lora("eval", base, "-d", texts, "--json").document
    model = load(base)
    expected = evaluate(model, read_examples_for(model, texts, 512)).as_dict()
    assert {name: document[name] for name in expected} == expected
    outcome = lora("eval", base, "-d", texts)
    for said in ("Tokens:", "nats per token", "Perplexity:", "Token accuracy:"):
        assert said in outcome.out


@pytest.fixture(scope="module")
def memorised(base, tmp_path_factory) -> Path:
    """Every weight trained on two questions until the tiny base knows their answers by heart."""
    folder = tmp_path_factory.mktemp("memorised")
    data = write_jsonl(folder / "rows.jsonl", 8 * [{"prompt": "up? ", "completion": "no"}, *KNOWN])
    settings = {"learning_rate": 0.02, "warmup": 0.0, "batch_size": 8, "epochs": 12, "save_every": 99}
    with pytest.warns(LoraWarning, match="no chat template"):
        return finetune(base, data, output=folder / "run", method="full", **settings).best


def test_answers_are_compared_with_the_rows(lora, memorised, tmp_path) -> None:
    wrong = {"prompt": "up? ", "completion": "yes"}
    data = write_jsonl(tmp_path / "rows.jsonl", [*KNOWN, {"prompt": "up? ", "completion": " no\n"}, wrong])
    document = lora("eval", memorised, "-d", data, "--exact-match", "--json").document
    assert document["task"] == "instruct"
    assert (document["exact_matches"], document["generated_rows"], document["unended_rows"]) == (2, 3, 0)
    assert (document["exact_match"], document["max_new_tokens"]) == (2 / 3, 64)
    assert "Exact match:    0.6667 (2 of 3 rows)" in lora("eval", memorised, "-d", data, "--exact-match").out
    options = ("--exact-match", "--max-new-tokens", 1)
    assert (
        "Cut answers:    3 had not ended after 1 tokens" in lora("eval", memorised, "-d", data, *options).out
    )
    assert "exact_match" not in lora("eval", memorised, "-d", data, "--json").document


def test_what_belongs_to_answers_is_refused_without_them(lora, base, texts) -> None:
    outcome = lora("eval", base, "-d", texts, "--exact-match")
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert "needs instructions" in outcome.err
    assert lora("eval", base, "-d", texts, "--max-new-tokens", 3).exit_code == 2


def test_cut_texts_are_counted_and_said(lora, adapter, rows) -> None:
    outcome = lora("eval", adapter, "-d", rows, "--max-seq-len", "6", "--json")
    assert outcome.document["truncated_rows"] == len(LABELLED)
    assert outcome.err == f"note: {len(LABELLED)} texts are longer than 6 tokens and keep their head\n"


def test_the_base_of_an_adapter_can_be_named(lora, adapter, own_base, rows) -> None:
    (own_base / "model.safetensors").unlink()
    assert lora("eval", adapter, "--base", own_base, "-d", rows).exit_code == 6
    assert lora("eval", own_base, "--base", own_base, "-d", rows).exit_code == 2


@pytest.mark.parametrize(
    ("model", "row", "said"),
    [
        ("adapter", {"text": "a"}, "is a classifier: expected rows with input and label; line 1 has text"),
        ("base", {"input": "a", "label": "good"}, "is a language model: expected rows with text"),
        ("adapter", {"input": "a", "label": "ugly"}, "'ugly' at line 1 is none of the classes bad, good"),
        (
            "adapter",
            {"input": "a", "label": 2},
            "F-CLASS-002: label 2 at line 1 out of range (num_classes=2)",
        ),
    ],
)
def test_rows_that_the_model_does_not_know_are_refused(
    lora, base, adapter, tmp_path, model: str, row: dict, said: str
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    outcome = lora("eval", {"base": base, "adapter": adapter}[model], "-d", data)
    assert outcome.exit_code == 5
    assert said in outcome.err


def test_checks_come_in_order(lora, own_base, tmp_path) -> None:
    data = tmp_path / "rows.jsonl"
    assert lora("eval", tmp_path / "nothing", "-d", data).exit_code == 3
    (own_base / "config.json").write_text("{")
    assert lora("eval", own_base, "-d", data).exit_code == 3
    data.write_text("{")
    assert lora("eval", own_base, "-d", data).exit_code == 5
    write_jsonl(data, LABELLED)
    assert lora("eval", own_base, "-d", data).exit_code == 4
    assert lora("eval", "./model.apr", "-d", data).exit_code == 3
    assert lora("eval", own_base, "-d", data, "--batch-size", "0").exit_code == 2


def test_a_model_card_is_written_beside_the_adapter(lora, adapter, rows, tmp_path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    trained = (folder / "README.md").read_text()  # written by the training
    assert "## Training, epoch by epoch" in trained
    assert "## Evaluation" not in trained
    outcome = lora("eval", folder, "-d", rows, "--generate-card", "--json")
    assert outcome.err == f"note: model card: {folder / 'README.md'}\n"
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    # the base is a folder, which is no link of the Hub's
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["lora", "qwen2"],
    }
    facts = json.loads((folder / "lora_metadata.json").read_text())
    for said in (
        f'| data_hash | "{facts["data_hash"]}" |',
        '```json\n["bad", "good"]\n```',
        f'| base_hash | "{facts["base_hash"]}" |',
        "| rows | 20 |",
        "| learning_rate | 0.1 |",
        "## Evaluation on rows.jsonl",
        f"| 1 | {facts['epochs'][0]['train_loss']:.6g} | {facts['epochs'][0]['val_loss']:.6g} |",
        f"| accuracy | {outcome.document['accuracy']:.6g} |",
        f"| mcc | {outcome.document['mcc']:.6g} |",
        f"AutoModelForSequenceClassification.from_pretrained({json.dumps(facts['base'])}, num_labels=2)",
    ):
        assert said in body
    assert lora("eval", folder, "-d", rows).exit_code == 0


def test_a_base_of_the_hub_is_linked_and_a_difference_said(base, texts) -> None:
    model = load(base)
    model.base_name = "Qwen/Qwen2.5-0.5B"
    config = LoraConfig(r=4, target_modules="qv")
    card = model_card(model, config, {}, {"loss": 1.5}, "texts.jsonl")
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["pipeline_tag"]) == ("Qwen/Qwen2.5-0.5B", "text-generation")
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "Note:" not in card
    model = load(base, num_labels=2)
    note = model.transformers_note()
    assert note is not None
    assert f"Note: {note}" in model_card(model, config, {"class_names": ["a", "b"]}, {}, "rows.jsonl")


def test_a_card_needs_an_adapter(lora, own_base, texts) -> None:
    outcome = lora("eval", own_base, "-d", texts, "--generate-card")
    assert outcome.exit_code == 2
    assert "adapter_config.json" in outcome.err
    assert not (own_base / "README.md").exists()
