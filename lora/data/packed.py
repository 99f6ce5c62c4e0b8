"""Sequences laid end to end without padding: what the model computes on.

N tokens of S sequences stand in one row; `cu_seqlens` holds the S + 1 boundaries between them, from 0 to N.
Attention and positions start anew at each boundary, so a batch costs what its tokens cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from lora.backend import Array, array_module
from lora.errors import ShapeError, ValidationError

IGNORED = -100  # a target that is not counted, as Transformers spells it

Kind = Literal["causal", "classify", "multi_label"]


@dataclass(frozen=True, eq=False)
class Packed:
    """Token sequences end to end, with what each token, or each sequence, should predict.

    Raises:
        ShapeError: the boundaries do not cut the tokens into non-empty sequences, or there is a target
            neither for each token nor for each sequence.
    """

    input_ids: np.ndarray  # [N] int64
    cu_seqlens: np.ndarray  # [S + 1] int64: 0, then the end of each sequence; the last is N
    # [N] int64: the next token, already shifted, -100 where not counted. Or [S] int64: the class. Or [S, C]
    # int64: 1 for each label that the sequence has, else 0. Or None.
    targets: np.ndarray | None = None

    def __post_init__(self) -> None:
        ends = self.cu_seqlens
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != self.num_tokens or not (np.diff(ends) > 0).all():
            raise ShapeError(
                f"expected boundaries that rise from 0 to {self.num_tokens} tokens, found {ends}"
            )
        if self.targets is not None and not self._fits(self.targets):
            raise ShapeError(
                f"expected a target for each of {self.num_tokens} tokens or {self.num_sequences} sequences, "
                f"found shape {self.targets.shape}"
            )

    def _fits(self, targets: np.ndarray) -> bool:
        if targets.ndim == 2:
            return len(targets) == self.num_sequences
        return targets.shape in ((self.num_tokens,), (self.num_sequences,))

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.input_ids)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each sequence, [S] int64."""
        return np.diff(self.cu_seqlens)

    @property
    def positions(self) -> np.ndarray:
        """The place of each token in its own sequence, from 0, [N] int64."""
        return np.arange(self.num_tokens) - np.repeat(self.cu_seqlens[:-1], self.lengths)

    @property
    def counted(self) -> int:
        """How many tokens, or sequences, enter the loss."""
        if self.targets is None:
            return 0
        return len(self.targets) if self.targets.ndim == 2 else int((self.targets != IGNORED).sum())

    def at(self, places: np.ndarray | None) -> Packed:
        """Return the tokens at `places` [R], each a sequence of its own; all as they are without places.

        Targets of tokens go with them; those of sequences stay, where there is one place for each.
        """
        if places is None:
            return self
        targets = self.targets
        if targets is not None and len(targets) == self.num_tokens:
            targets = targets[places]
        return Packed(self.input_ids[places], np.arange(len(places) + 1), targets)


def pack(sequences: Sequence[Any], targets: Any = None) -> Packed:
    """Lay `sequences` end to end.

    Args:
        sequences: S arrays of token ids, [T_s] each, of any integer dtype.
        targets: a class per sequence [S], or a 1 for each of its labels [S, C], else 0; or a target per token
            [N] that is shifted already; integers.

    Raises:
        ShapeError: there is no sequence, one is empty, or `targets` does not fit.
        ValidationError: ids or targets are not integers.
    """
    rows = [_integers(sequence, "token ids", ndim=1) for sequence in sequences]
    if not rows:
        raise ShapeError("expected at least one sequence, found none")
    cu_seqlens = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    if targets is not None:
        targets = _integers(targets, "targets", ndim=2 if np.ndim(targets) == 2 else 1)
    return Packed(np.concatenate(rows), cu_seqlens, targets)


def pack_causal(sequences: Sequence[Any], labels: Sequence[Any] | None = None) -> Packed:
    """Lay `sequences` end to end, each token's target the label of the next token of the same sequence.

    Args:
        sequences: S arrays of token ids, [T_s] each.
        labels: for each sequence the token that should stand at each place, -100 where it does not count;
            without it, the sequence itself. The shift is made here, so that labels are written as
            Transformers wants them.

    Raises:
        ShapeError: there is no sequence, one is empty, or labels differ from it in length.
        ValidationError: ids or labels are not integers.
    """
    labels = sequences if labels is None else labels
    lengths, label_lengths = ([len(row) for row in rows] for rows in (sequences, labels))
    if lengths != label_lengths:
        raise ShapeError(f"expected a label for each token, {lengths}; found {label_lengths}")
    return pack(sequences, np.concatenate([_shifted(row) for row in labels]) if lengths else None)


def pack_padded(input_ids: Any, attention_mask: Any = None, labels: Any = None, *, kind: Kind) -> Packed:
    """Take the padding out of a batch.

    Args:
        input_ids: [B, T] integers.
        attention_mask: [B, T] of 1 (or True) for tokens and 0 for padding, all of it on the right. Without
            it, every place holds a token.
        labels: "causal": [B, T], -100 where not counted, shifted here. "classify": the class of each row [B].
            "multi_label": [B, C], 1 for each label that a row has, else 0.
        kind: what `labels` are.

    Raises:
        ShapeError: mask or labels do not fit `input_ids`, or a row is all padding.
        ValidationError: something is not an integer; the mask holds another number, or padding before a
            token; padding has a label, which Transformers would count.
    """
    ids = _integers(input_ids, "input_ids", ndim=2)
    keep = _right_padded(attention_mask, ids.shape)
    targets = None if labels is None else _integers(labels, "labels", ndim=1 if kind == "classify" else 2)
    expected = ids.shape if kind == "causal" else ids.shape[:1]
    if targets is not None and targets.shape[: len(expected)] != expected:
        raise ShapeError(
            f"labels: expected shape {expected} beside input_ids {ids.shape}, found {targets.shape}"
        )
    sequences = [row[kept] for row, kept in zip(ids, keep, strict=True)]
    if targets is None or kind != "causal":
        return pack(sequences, targets)
    stray = int((targets[~keep] != IGNORED).sum())
    if stray:
        raise ValidationError(
            f"labels: expected {IGNORED} wherever attention_mask is 0, found {stray} other labels"
        )
    return pack_causal(sequences, [row[kept] for row, kept in zip(targets, keep, strict=True)])


def to_padded(values: Array, cu_seqlens: np.ndarray, num_columns: int, *, fill: float = 0) -> Array:
    """Undo `pack_padded`: return `values` [N, ...] as [S, num_columns, ...] with `fill` on the right.

    Raises:
        ShapeError: a sequence is longer than `num_columns`.
    """
    longest = int(np.diff(cu_seqlens).max())
    if longest > num_columns:
        raise ShapeError(f"expected sequences of at most {num_columns} tokens, found {longest}")
    xp = array_module(values)
    padded = xp.full((len(cu_seqlens) - 1, num_columns, *values.shape[1:]), fill, values.dtype)
    for row, (start, end) in enumerate(pairwise(cu_seqlens)):
        padded[row, : end - start] = values[start:end]
    return padded


def split(packed: Packed, max_tokens: int) -> list[Packed]:
    """Cut `packed` between sequences into parts of at most `max_tokens` tokens, in order; no cut gives fewer.

    Raises:
        ShapeError: one sequence alone is longer than `max_tokens`.
    """
    ends = packed.cu_seqlens
    longest = int(packed.lengths.max())
    if longest > max_tokens:
        raise ShapeError(f"expected sequences of at most {max_tokens} tokens, found one of {longest}")
    parts, first = [], 0
    while first < packed.num_sequences:
        last = int(np.searchsorted(ends, ends[first] + max_tokens, side="right")) - 1
        parts.append(_between(packed, first, last))
        first = last
    return parts


def _between(packed: Packed, first: int, last: int) -> Packed:
    """Return the sequences from `first` up to `last`, without it."""
    start, end = packed.cu_seqlens[first], packed.cu_seqlens[last]
    targets = packed.targets
    if targets is not None:
        # one target per sequence, or one per token; where every sequence is one token long, both cuts are the
        # same
        targets = targets[first:last] if len(targets) == packed.num_sequences else targets[start:end]
    return Packed(packed.input_ids[start:end], packed.cu_seqlens[first : last + 1] - start, targets)


def _shifted(labels: Any) -> np.ndarray:
    """Return the label of the next place for every place of one sequence, [T] int64; the last has none."""
    row = _integers(labels, "labels", ndim=1)
    return np.append(row[1:], IGNORED)


def _right_padded(attention_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the mask as [B, T] bool."""
    if attention_mask is None:
        return np.ones(shape, bool)
    mask = _integers(attention_mask, "attention_mask", ndim=2)
    if mask.shape != shape:
        raise ShapeError(f"attention_mask: expected {shape}, the shape of input_ids; found {mask.shape}")
    if not np.isin(mask, (0, 1)).all():
        raise ValidationError(
            f"attention_mask: expected 0 and 1, found {np.setdiff1d(mask, (0, 1))[:5].tolist()}"
        )
    all_padding = np.flatnonzero(~mask.any(axis=1))
    if all_padding.size:
        raise ShapeError(f"attention_mask: expected a token in every row, found none in row {all_padding[0]}")
    padded_left = np.flatnonzero((np.diff(mask, axis=1) > 0).any(axis=1))
    if padded_left.size:
        raise ValidationError(
            f"attention_mask: expected padding on the right only, found a token after padding in "
            f"{padded_left.size} rows, first row {padded_left[0]}; set padding_side='right'"
        )
    return mask.astype(bool)


def _integers(values: Any, name: str, *, ndim: int) -> np.ndarray:
    """Return `values` as int64, without a guess at what a fraction would mean."""
    array = np.asarray(values)
    if array.ndim != ndim:
        raise ShapeError(f"{name}: expected {ndim} axes, found shape {array.shape}")
    if array.size and array.dtype.kind not in "iub":
        raise ValidationError(f"{name}: expected integers, found {array.dtype}")
    return array.astype(np.int64, copy=False)
