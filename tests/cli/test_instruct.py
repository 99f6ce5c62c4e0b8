"""Instructions from the command line: trained, shown with what is learned of them, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import CONFIG
from tests.data.files import tokenizer_folder, write_jsonl
from tests.harness.models import TINY_QWEN3_5, write_model

ROWS = [{"instruction": f"say {i}", "response": f"it is {i}"} for i in range(8)]
QUICK = ("--epochs", "1", "--batch-size", "4")


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "dialogues.jsonl", ROWS)


def test_a_run_is_told_by_its_rows_trained_and_scored(lora, base, dialogues, tmp_path) -> None:
    run = lora("finetune", base, "-d", dialogues, "-o", tmp_path / "run", *QUICK, "--json").document
    assert run["task"] == "instruct"
    scores = lora("eval", run["best_checkpoint"], "-d", dialogues, "--json").document
    # "it is 0" and "<|im_end|>", which the byte-level vocabulary spells out
    assert scores["tokens"] == 8 * (len("it is 0") + len("<|im_end|>"))


@pytest.fixture(scope="module")
def base_of_qwen3_5(tmp_path_factory) -> Path:
    """A tiny checkpoint with gated-delta layers."""
    config = TINY_QWEN3_5 | {name: CONFIG[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    return tokenizer_folder(write_model(tmp_path_factory.mktemp("qwen3_5") / "base", config))


def test_the_other_family_is_trained_scored_merged_and_asked(
    lora, base_of_qwen3_5, dialogues, tmp_path
) -> None:
    outputs = tmp_path / "packed", tmp_path / "alone"
    for output, packing in zip(outputs, ("--packing", "--no-packing"), strict=True):
        options = ("--dtype", "float64", "--learning-rate", "0.01", "--epochs", "3", packing, "--json")
        run = lora("finetune", base_of_qwen3_5, "-d", dialogues, "-o", output, *options).document
        losses = [epoch["train_loss"] for epoch in run["epoch_metrics"]]
        assert (run["task"], losses[-1] < losses[0]) == ("instruct", True)
    scores = [
        lora("eval", output / "best", "-d", dialogues, "--dtype", "float64", "--json").document["loss"]
        for output in outputs
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    merged = tmp_path / "merged"
    assert lora("merge", "--adapter", outputs[0] / "best", "-o", merged).exit_code == 0
    after = lora("eval", merged, "-d", dialogues, "--dtype", "float64", "--json").document["loss"]
    assert after == pytest.approx(scores[0], rel=1e-5)
    answers = lora("eval", merged, "-d", dialogues, "--exact-match", "--max-new-tokens", 3, "--json").document
    assert (answers["generated_rows"], answers["exact_matches"], answers["unended_rows"]) == (8, 0, 8)


def test_what_is_learned_is_shown(lora, base, dialogues) -> None:
    outcome = lora("inspect", "data", dialogues, "--model", base, "-n", "2")
    assert outcome.out.splitlines() == [
        "line 1: 17 of 73 tokens are learned",
        "<|im_start|>user",
        "say 0<|im_end|>",
        "<|im_start|>assistant",
        "【it is 0<|im_end|>】",
        "",
        "line 2: 17 of 73 tokens are learned",
        "<|im_start|>user",
        "say 1<|im_end|>",
        "<|im_start|>assistant",
        "【it is 1<|im_end|>】",
        "",
    ]
    [row] = lora("inspect", "data", dialogues, "--model", base, "-n", "1", "--json").document["rows"]
    assert row["line"] == 1
    assert len(row["labels"]) == len(row["input_ids"])
    assert [i for i, label in enumerate(row["labels"]) if label != -100] == list(range(55, 72))


def test_a_row_with_nothing_left_to_learn_is_refused(lora, base, dialogues, tmp_path) -> None:
    outcome = lora("finetune", base, "-d", dialogues, "-o", tmp_path / "run", "--max-seq-len", "20")
    assert outcome.exit_code == 5
    assert "8 rows have nothing to learn within 20 tokens" in outcome.err
    assert not (tmp_path / "run").exists()


def test_the_checkpoint_s_own_template_is_used(lora, own_base, dialogues) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}"
    prompt = "{% if add_generation_prompt %}[assistant] {% endif %}"
    (own_base / "chat_template.jinja").write_text(template + prompt)
    outcome = lora("inspect", "data", dialogues, "--model", own_base, "-n", "1")
    assert outcome.out.splitlines()[1] == "[user] say 0;[assistant] 【it is 0;】"


def test_a_row_that_the_assistant_begins_is_named_by_its_line(lora, own_base, tmp_path) -> None:
    (own_base / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'system' %}[system]{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [asked, answered]}, "", {"messages": [answered, asked, answered]}]
    data = write_jsonl(tmp_path / "chats.jsonl", rows)
    outcome = lora("finetune", own_base, "-d", data, "-o", tmp_path / "run", *QUICK)
    assert (outcome.exit_code, outcome.err.count("\n")) == (5, 1)
    assert outcome.err.startswith("error: line 3: message 1: expected a user's or a system message")
    assert not (tmp_path / "run").exists()


def test_what_belongs_to_a_model_s_view_is_refused_without_one(lora, dialogues) -> None:
    assert lora("inspect", "data", dialogues, "-n", "2").exit_code == 2
    assert lora("inspect", "data", dialogues, "--max-seq-len", "9").exit_code == 2


def test_a_classifier_s_rows_have_no_tokens_to_show(lora, base, rows) -> None:
    assert lora("inspect", "data", rows, "--model", base).exit_code == 2


def test_a_plan_knows_the_task(lora, dialogues) -> None:
    plan = lora("finetune", "--model-size", "0.5B", "-d", dialogues, "--plan", "--json").document
    assert (plan["task"], plan["head_params"]) == ("instruct", 0)


def test_a_head_of_its_own_is_a_classifier_s(lora, base, dialogues, tmp_path) -> None:
    outcome = lora("finetune", base, "-d", dialogues, "-o", tmp_path / "run", "--method", "head")
    assert outcome.exit_code == 2


def test_prompts_learn_their_completion_and_its_end(lora, base, tmp_path) -> None:
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    shown = lora("inspect", "data", data, "--model", base, "--json").document
    assert shown["rows"][0]["text"] == "1+1=【2<|endoftext|>】"


def test_a_template_that_stands_in_is_said_once(lora, own_base, dialogues) -> None:
    view = ("inspect", "data", dialogues, "--model", own_base, "-n", "1")
    said = "note: the checkpoint has no chat template: conversations are written in ChatML\n"
    assert lora(*view).err == said
    prompts = write_jsonl(dialogues.with_name("prompts.jsonl"), [{"prompt": "a", "completion": "b"}])
    assert lora("inspect", "data", prompts, "--model", own_base).err == ""
    (own_base / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert said not in lora(*view).err
