"""Fine-tuning from a checkpoint and a data file to an adapter on disk: what `lora finetune` calls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora.backend import Array, blas_facts
from lora.contracts import family_contract
from lora.data.chat_template import ChatTemplate
from lora.data.classify import ClassifyData
from lora.data.split import stratified_split
from lora.data.tokenizer import Tokenizer
from lora.dispatch import Choice, chosen
from lora.errors import LoraWarning, MissingFileError, UsageError
from lora.estimate import Plan, plan
from lora.io.apr_folder import Folder
from lora.io.base_hash import base_hash
from lora.io.checkpoint import read_config
from lora.io.convert import folder_to_apr
from lora.io.hub import require_path, resolve
from lora.model.head import MULTI_LABEL, SINGLE_LABEL, ClassifierHead, ProblemType
from lora.model.loading import Base, base_name, open_base
from lora.model.model import Model
from lora.model.operations import operations
from lora.spec import ModelSpec, check_named_size, read_spec
from lora.train.callbacks import Callback, Started
from lora.train.class_weights import class_weights
from lora.train.config import FinetuneConfig
from lora.train.examples import Data, Examples, data_hash, detect_task, read_data, tokenise
from lora.train.identity import check_same_run, run_identity
from lora.train.loop import Loop, Progress
from lora.train.model_card import CARD_SETTINGS, epoch_facts, write_model_card
from lora.train.optimizer import AdamW
from lora.train.oversampling import oversampled
from lora.train.recipe import RECIPE_FILE, write_recipe
from lora.train.run import Run, write_run_file
from lora.train.run_folder import LAST, RunFolder, refuse_another_run, run_places, state_to_resume
from lora.train.state import STATE_FILE, State
from lora.train.tensorboard import require_tensorboard

PLANNED = (  # the settings that memory depends on
    "task",
    "method",
    "rank",
    "alpha",
    "targets",
    "device",
    "dtype",
    "batch_size",
    "max_seq_len",
    "grad_accum",
    "packing",
)


@dataclass(frozen=True)
class Prepared:
    """All that was read and checked before the weights are loaded."""

    config: FinetuneConfig  # task and method decided
    base: str  # what the adapter will call it
    folder: Folder  # of the base
    data_path: Path
    plan: Plan
    data: Data
    examples: Examples
    class_names: tuple[str, ...]

    @property
    def problem_type(self) -> ProblemType | None:
        """What a classifier decides of each row: its one class, or which labels it has; else None."""
        if not isinstance(self.data, ClassifyData):
            return None
        return MULTI_LABEL if self.data.is_multi_label else SINGLE_LABEL


@dataclass(frozen=True)
class Checked:
    """A run that may begin, or go on, once the weights are loaded."""

    prepared: Prepared
    output: Path
    apr: Path | None  # where its best state goes in the end, beside `output`
    identity: dict[str, Any]
    state: State | None  # that it goes on from


def finetune(
    model: Model | str | Path,
    data: str | Path,
    task: str | None = None,
    output: str | Path = "checkpoints",
    *,
    resume: bool = False,
    allow_data_mismatch: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Run:
    """Train an adapter (or, with method="full", every weight) on the rows of a file, and keep the best state.

    Args:
        model: a checkpoint's folder, an APR file, a hub id, or a model from `lora.load`.
        data: JSON Lines: {"input", "label"} to classify, or {"input", "labels"} where a row has any number of
            labels; {"text"} for a causal model; {"messages"}, {"instruction", "response"} or {"prompt",
            "completion"} to instruct.
        task: "classify", "causal" or "instruct"; None for what the first row's fields say.
        output: a folder; `best/`, `epoch-N/`, `metrics.jsonl`, `metrics.csv`, `run.json`, `recipe.yaml` and
            the state that a killed run goes on from are written into it.
            `lora.finetune(**lora.read_recipe("recipe.yaml") | {"output": "again"})` repeats the run.
            NAME.apr is for the best state as one APR file, once the run has ended; its folder is NAME-run.
        resume: go on with the run in `output`, in the bits of a run that never ended on the same machine;
            where none has begun, a new one is started, with a warning.
        allow_data_mismatch: go on though the rows have changed since.
        callbacks: told, in this order, of the start, of every step and of every epoch; an error that one
            raises ends the run and is passed on as it is.
        **settings: fields of `FinetuneConfig`.

    Returns:
        The run's outcome, with the path of its best state.

    Warns:
        LoraWarning: there is nothing to resume; or NumPy, its BLAS or the threads are not those that the run
            began with, and the last bits may differ.

    Raises:
        LoraError: settings, files, rows, configuration or weights are not as they must be, checked in this
            order; nothing is written before all of them are.
        DivergedError: a loss or gradient is no longer finite.
    """
    config = settings_of_run(task, settings)
    going_on = {"resume": resume, "allow_data_mismatch": allow_data_mismatch}
    checked = check_run(config, model, Path(data), Path(output), **going_on)
    base = model if isinstance(model, Model) else open_base(model, config.device, config.dtype)
    return train_run(base, checked, callbacks)


def check_run(
    config: FinetuneConfig,
    model: Model | str | Path,
    data: Path,
    output: Path,
    *,
    resume: bool,
    allow_data_mismatch: bool,
) -> Checked:
    """Read and check all that a run needs but the weights; arguments and errors as in `finetune`."""
    if allow_data_mismatch and not resume:
        raise UsageError("allow_data_mismatch belongs to resume")
    output, apr = run_places(output)
    if not resume:
        refuse_another_run(output)
    prepared = prepare(config, model, data)
    identity = run_identity(prepared, model)
    state = state_to_resume(output) if resume else None
    if state is not None:
        before = state.facts["identity"]
        check_same_run(output, before, identity, allow_data_mismatch=allow_data_mismatch)
    elif apr is not None and apr.exists():
        raise UsageError(f"output = {str(apr)!r} is there, and no run of it is; name another, or remove it")
    return Checked(prepared, output, apr, identity, state)


def train_run(base: Base | Model, checked: Checked, callbacks: Sequence[Callback]) -> Run:
    """Train what was checked: a new model on `base`, or the model that is given."""
    run = _train(_trainable_model(base, checked.prepared), checked, list(callbacks))
    if checked.apr is None:
        return run
    folder_to_apr(run.best, checked.apr)
    return replace(run, apr=checked.apr)


def prepare(config: FinetuneConfig, model: Model | str | Path, data: Path) -> Prepared:
    """Read and check everything but the weights: files, every row, config.json, tokenizer."""
    if not isinstance(model, Model):
        require_path(model)
    if not data.is_file():
        raise MissingFileError(
            f"{data}: expected a JSON Lines file, found {'a folder' if data.is_dir() else 'nothing'}"
        )
    if config.tensorboard:
        require_tensorboard()
    config = replace(config, task=config.task or detect_task(data))
    if config.oversample and config.task != "classify":
        raise UsageError("oversample repeats the rows of rare classes: expected task = 'classify'")
    if config.method == "head" and config.task != "classify":
        raise UsageError("method = 'head' trains a classifier's head alone: expected task = 'classify'")
    head = model.head if isinstance(model, Model) else None
    # a loaded classifier's head has its own order of classes, which that of the file's names may not be
    names = head.class_names if isinstance(head, ClassifierHead) else None
    rows = read_data(data, str(config.task), class_names=names, num_classes=config.num_classes)
    if isinstance(rows, ClassifyData) and rows.is_multi_label:
        _check_multi_label(config)
    folder = model.checkpoint.folder if isinstance(model, Model) else resolve(model)
    spec = read_spec(read_config(folder))
    if config.model_size is not None:
        check_named_size(spec, config.model_size)
    template = ChatTemplate.load(folder) if config.task == "instruct" else None
    examples = tokenise(rows, Tokenizer.load(folder), config.max_seq_len, template=template)
    class_names = rows.class_names if isinstance(rows, ClassifyData) else ()
    planned = _planned(config, spec, class_names)
    config = replace(config, method=planned.workload.method)
    _check_layout(config, spec)
    base = model.base_name if isinstance(model, Model) else base_name(model)
    return Prepared(config, base, folder, data, planned, rows, examples, class_names)


def _check_multi_label(config: FinetuneConfig) -> None:
    """Refuse what is defined by the one class of a row; "auto" weights are those of no imbalance."""
    named = {
        "class_weights": config.class_weights not in ("auto", "uniform"),
        "oversample": config.oversample,
        "label_smoothing": config.label_smoothing > 0,
    }
    found = [f"{name} = {getattr(config, name)!r}" for name, is_set in named.items() if is_set]
    if found:
        raise UsageError(f"rows with several labels have no one class: leave out {', '.join(found)}")


def _check_layout(config: FinetuneConfig, spec: ModelSpec) -> None:
    """Refuse a layout that the family does not have, or that nothing would be written in."""
    layouts = family_contract(spec.family).layouts
    if config.layout is not None and config.layout not in layouts:
        raise UsageError(f"layout = {config.layout!r}: {spec.family} has {' and '.join(layouts)} alone")
    if config.layout is not None and config.method != "lora":
        raise UsageError(f"layout names an adapter's tensors, and method {config.method!r} writes no adapter")


def _planned(config: FinetuneConfig, spec: ModelSpec, class_names: Sequence[str]) -> Plan:
    settings = {name: getattr(config, name) for name in PLANNED}
    if class_names:
        settings["num_classes"] = len(class_names)
    return plan(spec, **settings, head_bias=config.head_bias is not False)


def settings_of_run(task: str | None, settings: dict[str, Any]) -> FinetuneConfig:
    """Return the settings by name as one checked record.

    Raises:
        UsageError: a name is unknown, or a value out of range.
        UnsupportedError: a method or task that is not built yet.
    """
    unknown = sorted(settings.keys() - FinetuneConfig.__dataclass_fields__.keys())
    if unknown:
        known = ", ".join(sorted(FinetuneConfig.__dataclass_fields__))
        raise UsageError(f"unknown settings {', '.join(unknown)}; known: {known}")
    return FinetuneConfig(task=task, **settings)  # pyright: ignore[reportArgumentType]


def _trainable_model(base: Base | Model, prepared: Prepared) -> Model:
    config = prepared.config
    if isinstance(base, Base):
        model = base.model(
            class_names=prepared.class_names or None,
            pooling=config.pooling,
            head_bias=config.head_bias,
            problem_type=prepared.problem_type,
            seed=config.seed,
        )
    else:
        model = base
    if model.is_classifier != (config.task == "classify"):
        raise UsageError(
            f"task {config.task!r} does not fit the model's head; load it with or without num_labels"
        )
    if isinstance(model.head, ClassifierHead) and model.head.problem_type != prepared.problem_type:
        raise UsageError(
            f"the rows are those of problem_type = {prepared.problem_type!r}, and the model was loaded for "
            f"{model.head.problem_type!r}"
        )
    if config.method == "full":
        model.train_all()
    elif config.method == "lora" and model.parameters.adapter is None:
        model.add_adapter(config.lora_config(), seed=config.seed)
    return model


def _train(model: Model, checked: Checked, callbacks: list[Callback]) -> Run:
    prepared, output = checked.prepared, checked.output
    config, examples = prepared.config, prepared.examples
    train_rows, validation_rows = stratified_split(examples.strata, config.val_split, config.seed)
    once = len(train_rows)
    if config.oversample:
        train_rows = train_rows[oversampled(np.asarray(examples.classes)[train_rows], config.seed)]
    train, validation = examples.subset(train_rows), examples.subset(validation_rows)
    weights = _class_weights(config, train, prepared.class_names)
    facts: dict[str, Any] = {"data_hash": data_hash(prepared.data), "base": prepared.base}
    facts |= {"base_hash": base_hash(model.checkpoint), "rows": len(examples)}
    facts |= {"training": {name: getattr(config, name) for name in CARD_SETTINGS}}
    optimizer = AdamW(model, config.learning_rate, weight_decay=config.weight_decay)
    folder = RunFolder.begin(
        output,
        config,
        optimizer,
        checked.identity,
        checked.state,
        write=lambda path: _save(model, config, path, facts, folder.progress),
    )
    loop = Loop(
        model,
        config,
        train,
        validation,
        weights,
        prepared.plan.micro_batch_tokens,
        callbacks,
        folder.save,
        optimizer,
        folder.records,
        folder.checkpoint,
        folder.progress,
    )
    started = _started(loop, prepared, output, repeated_rows=len(train_rows) - once)
    ran = {"operations": [choice._asdict() for choice in started.operations]}
    with closing(folder):
        write_run_file(output, _run_facts(config, prepared, facts) | ran | {"parts": folder.parts})
        write_recipe(output / RECIPE_FILE, prepared.base, prepared.data_path, output, config)
        for callback in callbacks:
            callback.started(started)
            if prepared.problem_type == MULTI_LABEL:
                callback.said("rows with several labels: the split is drawn by the seed alone, not by class")
        _run(loop, folder)
    return _outcome(started, loop, folder.seconds())


def _run(loop: Loop, folder: RunFolder) -> None:
    try:
        loop.run()
    except KeyboardInterrupt:
        folder.checkpoint()
        folder.save(LAST)
        for callback in loop.callbacks:
            callback.said(
                f"interrupted after step {loop.progress.step}: its state is in {folder.path / STATE_FILE}; "
                f"what is trained so far is in {folder.path / LAST}"
            )
        raise


def _class_weights(config: FinetuneConfig, train: Examples, class_names: tuple[str, ...]) -> Array | None:
    if train.classes is None:
        return None
    return class_weights(train.classes, len(class_names), config.class_weights)


def _save(
    model: Model, config: FinetuneConfig, folder: Path, facts: dict[str, Any], progress: Progress
) -> None:
    with warnings.catch_warnings():
        # said once at the start, not at every epoch
        warnings.simplefilter("ignore", LoraWarning)
        if config.method == "lora":
            epochs = [epoch_facts(epoch) for epoch in progress.epochs]
            model.save_adapter(folder, metadata={**facts, "epochs": epochs}, layout=config.layout)
            write_model_card(folder, model)
        else:
            model.save(folder)
    if "apr" in config.checkpoint_format:
        folder_to_apr(folder, folder / ("adapter.apr" if config.method == "lora" else "model.apr"))


def _started(loop: Loop, prepared: Prepared, output: Path, *, repeated_rows: int) -> Started:
    weights = loop.class_weights
    return Started(
        task=str(prepared.config.task),
        method=prepared.config.method,
        device=prepared.config.device,
        train_rows=len(loop.train),
        repeated_rows=repeated_rows,
        validation_rows=len(loop.validation),
        truncated_rows=prepared.examples.truncated,
        max_seq_len=prepared.config.max_seq_len,
        total_steps=loop.total_steps,
        done_steps=loop.progress.step,
        trainable_parameters=sum(array.size for array in loop.model.trainable().values()),
        class_names=prepared.class_names,
        class_weights=None if weights is None else tuple(np.round(weights, 6).tolist()),
        micro_batch_tokens=loop.micro_tokens,
        note=loop.model.transformers_note(),
        output=output,
        operations=_operations(loop.model),
    )


def _operations(model: Model) -> tuple[Choice, ...]:
    """Return what runs each operation of a training of `model`."""
    used = operations(model.spec, classifies=model.is_classifier) | {"adamw"}
    return tuple(choice for choice in chosen(model.ops) if choice.operation in used)


def _run_facts(config: FinetuneConfig, prepared: Prepared, facts: dict[str, Any]) -> dict[str, Any]:
    from lora import __version__

    return {
        "lora_version": __version__,
        "numpy_version": np.__version__,
        "blas": blas_facts(),
        "settings": asdict(config),
        "class_names": prepared.class_names,
        "rows": len(prepared.examples),
        "truncated_rows": prepared.examples.truncated,
        **facts,
    }


def _outcome(started: Started, loop: Loop, seconds: float) -> Run:
    progress = loop.progress
    rows = len(progress.epochs) * len(loop.train)
    best = progress.best
    return Run(
        output=started.output,
        best=started.output / "best",
        task=started.task,
        method=started.method,
        epochs=tuple(progress.epochs),
        best_epoch=best.epoch if best else 0,
        best_val_loss=best.val_loss if best else float("nan"),
        stopped_early=progress.stopped_early,
        total_time_ms=round(1000 * seconds),
        tokens_per_sec=len(progress.epochs) * loop.train.tokens / seconds,
        samples_per_sec=rows / seconds,
        class_names=started.class_names,
        trainable_parameters=started.trainable_parameters,
        truncated_rows=started.truncated_rows,
        checkpoint_format=loop.config.checkpoint_format,
    )
