"""What is recorded: a model, a batch, and what is trained on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, TaskType
from transformers import PreTrainedConfig, PreTrainedModel

IGNORED = -100  # the label that no loss counts, in PyTorch and in Transformers


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids, their mask, and labels: [B, T] for a causal model, [B] for a classifier."""

    input_ids: torch.Tensor  # int64 [B, T]
    attention_mask: torch.Tensor  # int64 [B, T], ones then zeros
    labels: torch.Tensor  # int64 [B, T] or [B]


@dataclass(frozen=True)
class Case:
    """One model, one batch, and what is trained: adapters, or with `lora` None every weight."""

    name: str
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    batch: Batch
    lora: LoraConfig | None
    seed: int
    learning_rate: float = 1e-2  # of the recorded trajectory


def adapters(
    target_modules: list[str], *, task_type: TaskType = TaskType.CAUSAL_LM, **fields: object
) -> LoraConfig:
    """PEFT's LoRA of rank 4 and alpha 6: alpha / r is neither 1 nor a power of two."""
    usual = {"r": 4, "lora_alpha": 6, "target_modules": target_modules, "task_type": task_type}
    return LoraConfig(**(usual | fields))


def causal_batch(lengths: tuple[int, ...], *, vocab_size: int, pad_token_id: int, seed: int) -> Batch:
    """Random ids whose labels leave out the padding and about a fifth of the other tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids, attention_mask = _padded_ids(lengths, vocab_size, pad_token_id, generator)
    left_out = torch.rand(input_ids.shape, generator=generator) < 0.2
    left_out[0, 2] = True  # whatever the draw
    labels = input_ids.masked_fill(left_out | (attention_mask == 0), IGNORED)
    return Batch(input_ids, attention_mask, labels)


def classifier_batch(
    lengths: tuple[int, ...], *, num_labels: int, vocab_size: int, pad_token_id: int, seed: int
) -> Batch:
    """Random ids and one label per row; the first row holds a pad token that is content, not padding."""
    generator = torch.Generator().manual_seed(seed)
    input_ids, attention_mask = _padded_ids(lengths, vocab_size, pad_token_id, generator)
    # last-token pooling that stops at the first pad token, or counts the others, is caught by this one
    input_ids[0, 1] = pad_token_id
    labels = torch.randint(num_labels, (len(lengths),), generator=generator)
    return Batch(input_ids, attention_mask, labels)


def _padded_ids(
    lengths: tuple[int, ...], vocab_size: int, pad_token_id: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(lengths), max(lengths))
    # the pad token is kept out of the content: Transformers finds the last token by comparing ids with it
    input_ids = torch.randint(vocab_size - 1, shape, generator=generator)
    input_ids += (input_ids >= pad_token_id).long()
    attention_mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return input_ids.masked_fill(attention_mask == 0, pad_token_id), attention_mask
