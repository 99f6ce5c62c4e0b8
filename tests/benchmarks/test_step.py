"""`python -m benchmarks step` on a model that trains in a moment: the whole way, our side alone."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import models, step
from benchmarks.__main__ import main
from benchmarks.agreement import Disagreement
from benchmarks.cases import CASES, OURS, REALISTIC, SMOKE, Lengths
from benchmarks.data import draw, padding_share, row_lengths
from benchmarks.processes import Worker, WorkerError, clean_environment
from benchmarks.results import COMMON, read, write
from benchmarks.workers.serving import Job

CASE = next(case for case in CASES if case.name == SMOKE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    step.prepare(CASE, options(folder))
    return folder


def options(cache: Path, **given: object) -> argparse.Namespace:
    values = {"cache": cache, "rounds": 2, "starts": 1, "seed": 0, "peers": None, "output": cache / "out"}
    return argparse.Namespace(**(values | given))


def arguments(cache: Path, *cases: str) -> list[str]:
    out = ["--output", str(cache / "out"), "--cache", str(cache)]
    return ["step", "--cases", *cases, "--rounds", "2", "--starts", "1", *out]


def test_our_side_alone_is_measured_and_the_peer_named_as_missing(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(cache, SMOKE)) == 0
    shown = capsys.readouterr().out
    assert "lora-float32" in shown
    assert "peft-float32: not measured: no --peers given: `python -m benchmarks peers DIR`" in shown
    ours, theirs = read(cache / "out" / "step.jsonl")
    assert (ours["status"], ours["contestant"]) == ("measured", "lora-float32")
    assert len(ours["seconds"]["samples"]) == 2
    assert ours["tokens"] == CASE.lengths.rows * CASE.lengths.tokens
    assert ours["peak_bytes"] > ours["baseline_bytes"] > 0
    assert ours["mfu"] == pytest.approx(
        4 * ours["multiplied_parameters"] * ours["tokens_per_second"] / ours["gemm_flops"]
    )
    # 2 full layers, 4 heads of 16, rows of 16 tokens: 136 pairs each
    attention = 2 * 14 * 64 * 136 * CASE.lengths.rows / ours["tokens"]
    assert ours["products_share"] / ours["mfu"] == pytest.approx(
        1 + attention / (4 * ours["multiplied_parameters"])
    )
    assert sum(ours["split_seconds"].values()) > 0
    assert "seconds" not in theirs


def test_without_a_gpu_its_cases_say_so(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(step, "cuda_device", lambda: None)
    assert main(arguments(cache, "cuda-causal-1k", "cuda-qwen3.5-causal-4k")) == 0
    shown = capsys.readouterr().out
    assert shown.count("not measured: no CUDA device") == 3
    assert shown.count("not measured: Qwen3.5 has no CUDA kernels in this version") == 3


def test_sides_that_disagree_are_not_timed(cache: Path) -> None:
    with ExitStack() as stack:
        homes = [cache / "one", cache / "two"]
        for home in homes:
            home.mkdir()
        ours, again = (step.start(CASE, [OURS], options(cache), home, stack)[0] for home in homes)
        step.agree([ours, again])
        assert again.agreement == (0.0, 0.0, again.agreement.worst)
        with np.load(again.gradients) as file:
            tampered = {name: array * np.float32(1.01) for name, array in file.items()}
        np.savez(again.gradients, **tampered)
        with pytest.raises(Disagreement, match="allowed 1e-04 in float32"):
            step.agree([ours, again])


def test_a_disagreement_ends_with_1_and_writes_nothing(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(_: object) -> None:
        raise Disagreement("loss 1 against 2")

    monkeypatch.setattr(step, "agree", disagree)
    assert main([*arguments(cache, SMOKE), "--output", str(tmp_path)]) == 1
    assert "smoke: not timed, the sides disagree: loss 1 against 2" in capsys.readouterr().err
    assert not (tmp_path / "step.jsonl").exists()


def test_a_worker_that_ends_shows_why(cache: Path, tmp_path: Path) -> None:
    job = replace(step.job(CASE, OURS, cache, tmp_path), model=str(tmp_path / "nothing"))
    with pytest.raises(WorkerError, match="nothing"):
        Worker(step.sys.executable, "benchmarks.workers.ours", job, tmp_path)


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = Job("m", "a", "b", "g", "causal", "float32", "cpu", "lora")
    (tmp_path / "job.json").write_text(json.dumps(job.__dict__))
    assert Job.read(str(tmp_path / "job.json")) == job


def test_a_worker_inherits_nothing_that_favours_a_side() -> None:
    given = {"OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PATH": "/bin"}
    kept = clean_environment(given)
    assert kept.keys() == {"PATH", "PYTHONPATH", "HF_HUB_OFFLINE"}


def test_rows_of_the_realistic_traffic_are_as_described() -> None:
    rng = np.random.default_rng(0)
    lengths = np.concatenate([row_lengths(REALISTIC, rng) for _ in range(500)])
    assert 57 < np.median(lengths) < 63
    assert 0.7 < np.log(lengths[lengths < 512]).std() < 0.9
    assert lengths.max() == 512


def test_padding_is_what_the_longest_row_adds() -> None:
    batches = draw(Lengths(rows=3, tokens=5), "classify", 10, 1, 0)
    assert padding_share(batches) == 0
    uneven = draw(replace(REALISTIC, batches=1), "classify", 10, 1, 0)
    sizes = [len(row) for row in uneven[0].rows]
    assert padding_share(uneven) == pytest.approx(1 - sum(sizes) / (8 * max(sizes)))


def test_every_turn_has_the_same_lengths_and_other_ids() -> None:
    first, second = np.array_split(draw(replace(REALISTIC, batches=2), "causal", 50, 2, 0), 2)
    assert [[len(row) for row in batch.rows] for batch in first] == [
        [len(row) for row in batch.rows] for batch in second
    ]
    assert first[0].rows != second[0].rows


@pytest.mark.parametrize(("task", "expected"), [("classify", 357_826_560), ("causal", 493_961_216)])
def test_the_multiplied_parameters_of_half_a_billion(task: str, expected: int) -> None:
    # 24 · (2 · 896² + 2 · 128 · 896 + 3 · 4,864 · 896), and with a language model's head 151,936 · 896 more
    assert models.multiplied_parameters(models.config("qwen2.5-0.5b", task), task) == expected


@pytest.mark.parametrize("model", models.CONFIGS)
@pytest.mark.parametrize("task", ["classify", "causal"])
def test_a_classifier_has_a_score_and_no_language_head(model: str, task: str) -> None:
    shapes = models.shapes(models.config(model, task), task)
    assert (models.SCORE in shapes) == (task == "classify")
    assert task == "causal" or "lm_head.weight" not in shapes


def test_records_replace_older_ones_of_their_kind(tmp_path: Path) -> None:
    machine = {"cpu": "x", "cores": 1, "gpu": None}
    record = dict.fromkeys(COMMON, "a") | {"machine": machine}
    path = tmp_path / "r.jsonl"
    write(path, [record | {"case": "one", "date": "1"}, record | {"case": "two", "date": "1"}])
    write(path, [record | {"case": "one", "date": "2"}])
    assert [(r["case"], r["date"]) for r in read(path)] == [("two", "1"), ("one", "2")]
    with pytest.raises(ValueError, match="commit missing"):
        write(path, [{key: value for key, value in record.items() if key != "commit"}])
