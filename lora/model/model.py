"""The model that users hold: logits, losses and gradients, adapters, merging, saving."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora.backend import Array, named_stream, wide
from lora.data.packed import Packed, pack_padded, to_padded
from lora.dispatch import Ops
from lora.errors import AdapterError, DataError, LoraWarning, ShapeError, UsageError
from lora.io.apr_folder import open_folder
from lora.io.base_hash import base_change
from lora.io.checkpoint import Checkpoint
from lora.io.lora_config import LoraConfig
from lora.io.peft import load_adapter, save_adapter
from lora.io.targets import expanded, with_shorthand
from lora.model import decoder, merging
from lora.model.adapters import adapter_from_tensors, new_adapter
from lora.model.context import Gradients
from lora.model.generation import Ended, Step, steps
from lora.model.head import ClassifierHead, Head
from lora.model.head_file import transformers_note
from lora.model.merging import MergeReport
from lora.model.parameters import Parameters, by_name
from lora.model.sampling import Sampling
from lora.model.saving import save_model
from lora.spec import ModelSpec, adaptable_modules

PROBE_TOKENS = 16


@dataclass
class StepResult:
    """Loss and gradients of one packed batch."""

    loss: float  # divided by the normalizer, in nats
    correct: int  # counted tokens, or rows, whose largest logit is the target's
    gradients: dict[str, Array]  # by PEFT's tensor names, accumulation dtype


class Model:
    """A Qwen model with its weights, its head and any adapters; made by `lora.load`."""

    def __init__(
        self,
        spec: ModelSpec,
        parameters: Parameters,
        head: Head,
        ops: Ops,
        dtype: np.dtype[Any],
        checkpoint: Checkpoint,
        base_name: str,
    ) -> None:
        self.spec = spec
        self.parameters = parameters
        self.head = head
        self.ops = ops
        self.dtype = dtype
        self.checkpoint = checkpoint
        self.base_name = base_name  # what an adapter calls this model
        self._originals = merging.Originals()

    @property
    def is_classifier(self) -> bool:
        """Whether the head is a classifier's."""
        return isinstance(self.head, ClassifierHead)

    @property
    def _task_type(self) -> str:
        return "SEQ_CLS" if self.is_classifier else "CAUSAL_LM"

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> Array:
        """Return logits in the accumulation dtype: [B, T, V], zero where the mask is; a classifier's [B, C].

        Args:
            input_ids: integers [B, T] in [0, V).
            attention_mask: [B, T], ones then zeros in each row; None where every token counts.

        Raises:
            DataError: an id is outside the vocabulary, or the mask is not right-padded.
        """
        batch = self._pack(input_ids, attention_mask, None)
        logits = self.packed_logits(batch)
        if self.is_classifier:
            return logits
        return to_padded(logits, batch.cu_seqlens, np.shape(input_ids)[1])

    def packed_logits(self, batch: Packed) -> Array:
        """Return the logits of a packed batch: [N, V], or a classifier's [S, C]."""
        read = self.head.reads(batch) if self.is_classifier else None
        hidden = self._forward(batch, read, record=False)[0]
        return self.head.logits(self.ops, self.parameters, hidden, batch.at(read))

    def score(self, batch: Packed, class_weights: Array | None = None) -> Any:
        """Return the Outcome of a packed batch: its summed loss, and how many were right; no gradients."""
        read = self.head.reads(batch)
        hidden = self._forward(batch, read, record=False)[0]
        return self.head.score(self.ops, self.parameters, hidden, batch.at(read), class_weights=class_weights)

    def loss_and_gradients(
        self,
        input_ids: Any,
        labels: Any,
        attention_mask: Any = None,
        *,
        normalizer: float | None = None,
        class_weights: Any = None,
    ) -> tuple[float, dict[str, Array]]:
        """Return (loss in nats, gradients by PEFT's tensor names).

        Args:
            input_ids: integers [B, T] in [0, V).
            labels: a causal model's [B, T], shifted inside, -100 where nothing counts; a classifier's [B], or
                of one with several labels [B, C], 1 for each label of a row, else 0.
            attention_mask: [B, T], ones then zeros in each row; None where every token counts.
            normalizer: what the summed loss is divided by, so that a caller can add up the parts of a larger
                batch exactly; None for the number of counted tokens (of rows; the sum of their weights; rows
                times labels).
            class_weights: [C], a classifier's weight of each class.

        Raises:
            DataError: no token counts, an id or a label is out of range, the mask is not right-padded.
            AdapterError: nothing is trainable: no adapter, no classifier head, not under full training.
        """
        batch = self._pack(input_ids, attention_mask, labels)
        result = self.step(batch, normalizer=normalizer, class_weights=class_weights)
        return result.loss, result.gradients

    def step(
        self,
        batch: Packed,
        *,
        normalizer: float | None = None,
        class_weights: Array | None = None,
        label_smoothing: float = 0.0,
    ) -> StepResult:
        """Return loss and gradients of a packed batch; arguments and errors as in `loss_and_gradients`.

        Args:
            batch: with targets.
            normalizer: what the summed loss is divided by.
            class_weights: [C], a classifier's weight of each class.
            label_smoothing: in [0, 1), the share of each target that is spread evenly over all classes.
        """
        self._check_trainable()
        if normalizer is None:
            normalizer = self.head.normalizer(batch, class_weights)
        if normalizer <= 0:
            raise DataError("no token of this batch counts: every label is -100, or every class weight zero")
        gradients = Gradients(self.parameters)
        read = self.head.reads(batch)
        hidden, tape = self._forward(batch, read, record=True)
        outcome, dhidden = self.head.loss(
            self.ops,
            hidden,
            batch.at(read),
            gradients,
            normalizer=normalizer,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
        )
        decoder.backward(tape, dhidden, gradients)
        return StepResult(outcome.loss, outcome.correct, by_name(gradients.arrays))

    def trainable(self) -> dict[str, Array]:
        """Return every trained array, live and writable, by the name that its gradient has."""
        return self.parameters.trainable()

    def train_all(self) -> None:
        """Make every weight trainable (full fine-tuning): a float32 copy of each, by its own tensor name."""
        self.parameters.train_all()

    def add_adapter(self, config: LoraConfig, seed: int = 0, name: str = "default") -> None:
        """Attach a new adapter and make it the active one.

        Raises:
            AdapterError: a target matches nothing, the name is in use, or an adapter is merged.
            UnsupportedError: the configuration asks for what is not built.
        """
        self._check_new(name)
        config.validate()
        config = replace(config, task_type=self._task_type, base_model_name_or_path=self.base_name)
        self.parameters.adapters[name] = new_adapter(self.parameters, self.spec, config, seed)
        self.parameters.activate(name)

    def load_adapter(self, folder: str | os.PathLike[str], name: str = "default") -> None:
        """Read an adapter in PEFT's format, or in an APR file, and make it the active, trainable one.

        Warns:
            LoraWarning: the base is not as it was when the adapter was trained on it.

        Raises:
            AdapterError: a tensor does not match the model, or the name is in use.
            UnsupportedError: the configuration asks for what is not built.
        """
        self._check_new(name)
        config, tensors, facts = load_adapter(open_folder(folder))
        config = replace(config, task_type=self._task_type)
        config = with_shorthand(config, facts.get("targets"), adaptable_modules(self.spec))
        adapter = adapter_from_tensors(self.parameters, self.spec, config, tensors)
        adapter.facts = facts
        change = base_change(self.checkpoint, facts)
        if change is not None:
            warnings.warn(change, LoraWarning, stacklevel=2)
        self.parameters.adapters[name] = adapter
        self.parameters.activate(name)

    def set_adapter(self, name: str) -> None:
        """Switch to another adapter that is attached."""
        self.parameters.activate(name)

    def save_adapter(
        self, folder: str | Path, metadata: Mapping[str, Any] | None = None, *, layout: str | None = None
    ) -> None:
        """Write the active adapter in PEFT's format.

        Args:
            folder: where to write; a name that ends in .apr gives one APR file.
            metadata: JSON values that are kept beside the adapter, in lora_metadata.json.
            layout: "text" or "multimodal", whose names the tensors get; None for the base's own.

        Raises:
            AdapterError: no adapter is active.
            WriteError: the folder cannot be written; what was there is unharmed.
        """
        adapter = self._active()
        facts = {"targets": adapter.config.target_modules, **(metadata or {})}
        if isinstance(self.head, ClassifierHead):
            facts |= {"pooling": self.head.pooling, "class_names": list(self.head.class_names)}
            facts["problem_type"] = self.head.problem_type
        self._warn_of_transformers()
        config = expanded(adapter.config, adaptable_modules(self.spec))
        save_adapter(Path(folder), config, adapter.tensors(layout or self.parameters.layout), facts)

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 64,
        attention_mask: Any = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> list[np.ndarray]:
        """Return a continuation of each prompt: one array of new ids a row, its end token included.

        Args:
            input_ids: integers [B, T] in [0, V).
            max_new_tokens: where a row stops that has not come to an end token; 1 or more.
            attention_mask: [B, T], ones then zeros in each row; None where every token counts.
            temperature: divides the logits before a token is drawn; 0 takes the likeliest.
            top_p: draws from the likeliest tokens that hold this share alone, in (0, 1].
            top_k: draws from this many of the likeliest tokens alone; 0 for all.
            seed: of the draws; a row's depend on it and on the row's own ids, whatever else is in the batch.
            stop_ids: tokens that end a row, beside the checkpoint's own end tokens.

        Raises:
            UsageError: the model is a classifier, or a setting is out of its range.
            DataError: an id is outside the vocabulary.
        """
        prompts = self._pack(input_ids, attention_mask, None)
        sampling = Sampling(temperature, top_p, top_k, seed)
        ends = {*self.spec.eos_token_ids, *map(int, stop_ids)}
        new: list[list[int]] = [[] for _ in range(prompts.num_sequences)]
        for step in self.stream(prompts, max_new_tokens, sampling, lambda _, tokens: tokens[-1] in ends):
            for row, token in step:
                new[row].append(token)
        return [np.array(row, np.int64) for row in new]

    def stream(
        self, prompts: Packed, max_new_tokens: int, sampling: Sampling, ended: Ended | None = None
    ) -> Iterator[Step]:
        """Yield the continuations of packed prompts as they come: a list of (prompt, token) a step.

        Args:
            prompts: S sequences of token ids.
            max_new_tokens: where a prompt stops that has not ended; 1 or more.
            sampling: how a token is chosen.
            ended: given a prompt's index and its new tokens, says whether it ends there; None for the
                checkpoint's own end tokens.

        Raises:
            UsageError: the model is a classifier, or max_new_tokens is below 1.
            DataError: an id is outside the vocabulary.
        """
        if self.is_classifier or max_new_tokens < 1:
            raise UsageError(
                f"generate needs a causal model and max_new_tokens >= 1; got {self._task_type} "
                f"and {max_new_tokens}"
            )
        self.check_ids(prompts)
        if ended is None:
            ended = self._at_end_token
        return steps(
            self.ops, self.parameters, self.spec, self.dtype, prompts, max_new_tokens, sampling, ended
        )

    def _at_end_token(self, row: int, new: Sequence[int]) -> bool:
        return new[-1] in self.spec.eos_token_ids

    def merge_adapter(self, probe: Any = None) -> MergeReport:
        """Add the active adapter to the weights, in float32 with one rounding; report what rounding changed.

        Args:
            probe: ids [B, T] of the batch that logits are compared on; None draws one from a fixed seed.

        Raises:
            AdapterError: no adapter is active, or one is merged already.
        """
        adapter = self._active()
        batch = self._probe(probe)
        before = self.packed_logits(batch)
        self._originals = merging.merge(self.parameters, adapter)
        self.parameters.merged = self.parameters.active
        difference = float(abs(wide(self.packed_logits(batch)) - before).max())
        return MergeReport(
            str(self.parameters.merged), len(adapter.factors), len(adapter.replaced), difference
        )

    def unmerge_adapter(self) -> None:
        """Put the base weights back, bit for bit.

        Raises:
            AdapterError: no adapter is merged.
        """
        if self.parameters.merged is None:
            raise AdapterError("no adapter is merged")
        merging.unmerge(self.parameters, self._originals)
        self._originals = merging.Originals()
        self.parameters.merged = None

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint that Transformers loads, each tensor in its stored dtype.

        A name that ends in .apr gives one APR file, which `lora.load` and `lora convert` read.

        Raises:
            AdapterError: an adapter is active and not merged: call `merge_adapter` first.
            WriteError: the folder cannot be written; what was there is unharmed.
        """
        if self.parameters.adapter is not None:
            raise AdapterError(
                f"the adapter {self.parameters.active!r} is not merged: call merge_adapter() before save(), "
                "or save_adapter() for the adapter alone"
            )
        self._warn_of_transformers()
        save_model(Path(folder), self.checkpoint, self.parameters, self.head)

    def transformers_note(self) -> str | None:
        """Say where Transformers would compute other logits from what is saved, or None where it agrees."""
        return transformers_note(self.head, has_bias="score.bias" in self.parameters)

    def _warn_of_transformers(self) -> None:
        note = self.transformers_note()
        if note is not None:
            warnings.warn(note, LoraWarning, stacklevel=3)

    def hidden_states(self, batch: Packed) -> Array:
        """Return the normed output of the last block, [N, D] in the compute dtype."""
        return self._forward(batch, None, record=False)[0]

    def _forward(self, batch: Packed, read: np.ndarray | None, *, record: bool) -> tuple[Array, decoder.Tape]:
        return decoder.forward(
            self.ops, self.parameters, self.spec, batch, self.dtype, record=record, read=read
        )

    def _pack(self, input_ids: Any, attention_mask: Any, labels: Any) -> Packed:
        if attention_mask is None and isinstance(self.head, ClassifierHead) and self.head.pooling == "last":
            attention_mask = _up_to_last_token(np.asarray(input_ids), self.spec.pad_token_id)
        kind = "causal"
        if isinstance(self.head, ClassifierHead):
            kind = "multi_label" if self.head.is_multi_label else "classify"
        batch = pack_padded(input_ids, attention_mask, labels, kind=kind)
        self.check_ids(batch)
        return batch

    def check_ids(self, batch: Packed) -> None:
        """Refuse ids outside the vocabulary, and labels outside the head.

        Raises:
            DataError: the first offending value, and the range.
        """
        _check_range("input id", batch.input_ids, self.spec.vocab_size)
        if batch.targets is None:
            return
        if isinstance(self.head, ClassifierHead) and self.head.is_multi_label:
            _check_labels(batch.targets, len(self.head.class_names))
        elif isinstance(self.head, ClassifierHead):
            _check_range("F-CLASS-002: label", batch.targets, len(self.head.class_names))
        else:
            _check_range("label", batch.targets[batch.targets != -100], self.spec.vocab_size)

    def _check_trainable(self) -> None:
        if not self.parameters.full and self.parameters.adapter is None and not self.is_classifier:
            raise AdapterError(
                "nothing is trainable: add_adapter() first, or train_all() for full fine-tuning"
            )
        if self.parameters.adapter is not None:
            self.parameters.adapter.config.validate()  # one that only runs may have what cannot be trained

    def _check_new(self, name: str) -> None:
        if name in self.parameters.adapters:
            raise AdapterError(f"an adapter named {name!r} is attached already; choose another name")
        if self.parameters.full:
            raise AdapterError("the model is under full training; load it anew to train an adapter")
        if self.parameters.merged is not None:
            raise AdapterError(
                f"the adapter {self.parameters.merged!r} is merged; call unmerge_adapter() first"
            )

    def _active(self) -> Any:
        if self.parameters.merged is not None:
            raise AdapterError(
                f"the adapter {self.parameters.merged!r} is merged; call unmerge_adapter() first"
            )
        if self.parameters.adapter is None:
            raise AdapterError("no adapter is active: add_adapter() or load_adapter() first")
        return self.parameters.adapter

    def _probe(self, probe: Any) -> Packed:
        if probe is None:
            rng = named_stream(0, "merge probe")
            probe = rng.integers(0, self.spec.vocab_size, (2, PROBE_TOKENS))
        return self._pack(probe, None, None)


def _up_to_last_token(input_ids: Array, pad_token_id: int | None) -> Array | None:
    """Return the mask [B, T] that ends with each row's last token that is not padding, as in Transformers."""
    if pad_token_id is None:
        return None
    from_the_right = np.logical_or.accumulate((input_ids != pad_token_id)[:, ::-1], axis=1)
    return from_the_right[:, ::-1]


def _check_labels(targets: Array, count: int) -> None:
    if targets.shape[1:] != (count,):
        raise ShapeError(f"labels: expected a 0 or 1 for each of {count} labels, found {list(targets.shape)}")
    _check_range("label", targets, 2)


def _check_range(what: str, values: Array | Sequence[int], count: int) -> None:
    values = np.asarray(values)
    wrong = values[(values < 0) | (values >= count)]
    if wrong.size:
        raise DataError(f"{what} {wrong[0]} out of range: expected 0 to {count - 1}")
