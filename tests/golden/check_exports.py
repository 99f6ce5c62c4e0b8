"""Checks by hand, with the real PEFT and Transformers, that what `lora` writes means the same there.

Run in the environment that README.md names, with this library installed there:

    python tests/golden/check_exports.py [qwen2] [qwen3_5]

Each check trains an adapter for a few steps on a tiny random base. It then requires that PEFT reads every
tensor of the saved adapter and no other, that Transformers loads the merged checkpoint without a missing or
an unexpected name, and that both give our logits.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import make_qwen2
import make_qwen3_5
import numpy as np
import torch
from cases import Batch, causal_batch, classifier_batch
from peft import PeftModel, get_peft_model_state_dict
from recorder import Initializer, randomize
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextForSequenceClassification,
)

import lora

TOLERANCE = 1e-5  # norm of the difference over the norm; float32 runs of such models differ by about 1e-6
STEPS = 5
NUM_LABELS = 3
LENGTHS = (9, 70, 4)


class Family(NamedTuple):
    """How to make tiny random models of one family."""

    causal: type[PreTrainedModel]
    classifier: type[PreTrainedModel]
    small_config: Callable[..., PreTrainedConfig]
    initializer: Initializer
    vocab_size: int
    pad_token_id: int

    def config(self, **changes: object) -> PreTrainedConfig:
        """Sizes of the golden cases, with a pad token, which Transformers' classifiers need."""
        return self.small_config(pad_token_id=self.pad_token_id, **changes)

    def write_base(self, model: PreTrainedModel, folder: Path) -> Path:
        """Draw the model's weights, save it as Transformers does, and return the folder."""
        randomize(model, self.initializer, torch.Generator().manual_seed(3))
        model.save_pretrained(folder)
        return folder

    def causal_rows(self) -> Batch:
        """Padded rows with next-token labels."""
        return causal_batch(LENGTHS, vocab_size=self.vocab_size, pad_token_id=self.pad_token_id, seed=1)

    def labelled_rows(self) -> Batch:
        """Padded rows with a class each."""
        vocabulary = {"vocab_size": self.vocab_size, "pad_token_id": self.pad_token_id}
        return classifier_batch(LENGTHS, num_labels=NUM_LABELS, **vocabulary, seed=2)


QWEN2 = Family(
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    make_qwen2.small_config,
    make_qwen2.initial_value,
    make_qwen2.VOCAB,
    make_qwen2.PAD,
)
QWEN3_5 = Family(
    Qwen3_5ForCausalLM,
    Qwen3_5TextForSequenceClassification,
    make_qwen3_5.small_config,
    make_qwen3_5.initial_value,
    make_qwen3_5.VOCAB,
    make_qwen3_5.PAD,
)


def check_tied(family: Family, folder: Path) -> None:
    """Query and value adapters over a base whose head is its embedding."""
    base = family.write_base(family.causal(family.config(tie_word_embeddings=True)), folder / "base")
    check_exports(lora.load(base), AutoModelForCausalLM, base, "qv", family.causal_rows())


def check_untied(family: Family, folder: Path) -> None:
    """Adapters everywhere over a base with a head of its own."""
    base = family.write_base(family.causal(family.config(tie_word_embeddings=False)), folder / "base")
    check_exports(lora.load(base), AutoModelForCausalLM, base, "all-linear", family.causal_rows())


def check_new_head(family: Family, folder: Path) -> None:
    """A head that we added to a causal base, in the form that Transformers computes: last token, no bias."""
    base = family.write_base(family.causal(family.config(num_labels=NUM_LABELS)), folder / "base")
    ours = lora.load(base, num_labels=NUM_LABELS, pooling="last", head_bias=False)
    check_exports(ours, AutoModelForSequenceClassification, base, "qv", family.labelled_rows())


def check_transformers_head(family: Family, folder: Path) -> None:
    """A classification checkpoint of Transformers' own, whose head we must take as it is."""
    base = family.write_base(family.classifier(family.config(num_labels=NUM_LABELS)), folder / "base")
    check_exports(lora.load(base), AutoModelForSequenceClassification, base, "qv", family.labelled_rows())


def check_multimodal_layout(family: Family, folder: Path) -> None:
    """The published checkpoints' layout: names under language_model, and a vision tower that is not ours."""
    text = family.config()
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 2}
    config = Qwen3_5Config(
        text_config=text.to_dict(),
        vision_config=vision | {"out_hidden_size": text.hidden_size, "num_position_embeddings": 16},
        tie_word_embeddings=text.tie_word_embeddings,
        attn_implementation="eager",
    )
    base = family.write_base(Qwen3_5ForConditionalGeneration(config), folder / "base")
    check_exports(lora.load(base), AutoModelForImageTextToText, base, "qv", family.causal_rows())
    require_vision_tower_kept(base, folder / "merged")


CHECKS_OF_BOTH = (check_tied, check_untied, check_new_head, check_transformers_head)
CHECKS = {
    "qwen2": [(QWEN2, check) for check in CHECKS_OF_BOTH],
    "qwen3_5": [(QWEN3_5, check) for check in (*CHECKS_OF_BOTH, check_multimodal_layout)],
}


def check_exports(ours: lora.Model, auto_class: type, base: Path, target_modules: str, batch: Batch) -> None:
    """Train, save, merge and save `ours`, and require PEFT's and Transformers' agreement with it."""
    before = logits_of(ours, batch)
    ours.add_adapter(lora.LoraConfig(r=4, lora_alpha=6, target_modules=target_modules), seed=4)
    train(ours, batch)
    expected = logits_of(ours, batch)
    require(relative_difference(before, expected) > 0.01, "training changed nothing that a check could see")

    adapter = base.with_name("adapter")
    ours.save_adapter(adapter)
    theirs = PeftModel.from_pretrained(auto_class.from_pretrained(base), str(adapter))
    require_every_tensor_loaded(theirs, adapter)
    require_same_logits("the adapter in PEFT", theirs, batch, expected)

    ours.merge_adapter()
    merged = base.with_name("merged")
    ours.save(merged)
    theirs, loading = auto_class.from_pretrained(merged, output_loading_info=True)
    wrong = {kind: names for kind, names in loading.items() if names}
    require(not wrong, f"Transformers found fault with the names of the merged checkpoint: {wrong}")
    require_same_logits("the merged checkpoint in Transformers", theirs, batch, expected)


def train(ours: lora.Model, batch: Batch) -> None:
    """A few steps at a high rate: B starts at zero, and an adapter of zeros would prove nothing."""
    optimizer = lora.AdamW(ours, lr=0.02)
    for _ in range(STEPS):
        _, gradients = ours.loss_and_gradients(
            batch.input_ids.numpy(), batch.labels.numpy(), batch.attention_mask.numpy()
        )
        optimizer.step(gradients)


def logits_of(ours: lora.Model, batch: Batch) -> np.ndarray:
    """Our logits at the positions that are not padding, [N, V], or a classifier's, [B, C]."""
    return counted(np.asarray(ours(batch.input_ids.numpy(), batch.attention_mask.numpy())), batch)


def counted(logits: np.ndarray, batch: Batch) -> np.ndarray:
    """A causal model's logits where the mask is 1, a classifier's as they are."""
    return logits[batch.attention_mask.numpy() == 1] if logits.ndim == 3 else logits


def require_every_tensor_loaded(theirs: PeftModel, adapter: Path) -> None:
    """Fail unless PEFT would save the very file again: of a name that it does not find it only warns."""
    written = load_file(adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    require(written.keys() == loaded.keys(), f"names differ: {sorted(written.keys() ^ loaded.keys())}")
    wrong = [name for name, tensor in written.items() if not np.array_equal(tensor, loaded[name].numpy())]
    require(not wrong, f"PEFT did not load the values of {wrong}")


def require_same_logits(what: str, theirs: torch.nn.Module, batch: Batch, expected: np.ndarray) -> None:
    """Fail unless `theirs` gives the expected logits on `batch`."""
    with torch.no_grad():
        output = theirs.eval()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    difference = relative_difference(counted(output.logits.numpy(), batch), expected)
    require(difference < TOLERANCE, f"{what}: logits differ by {difference:.1e}, allowed {TOLERANCE:.0e}")
    print(f"  {what}: logits differ by {difference:.1e}")


def require_vision_tower_kept(base: Path, merged: Path) -> None:
    """Fail unless every vision tensor came through the merge bit for bit."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    vision = [name for name in before if ".visual." in name]
    require(bool(vision), "the base of this check has no vision tower")
    wrong = [name for name in vision if not np.array_equal(before[name], after[name])]
    require(not wrong, f"the merge changed {wrong}")


def relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def require(condition: bool, message: str) -> None:
    """Fail with `message` unless `condition`."""
    if not condition:
        raise AssertionError(message)


def main(names: list[str]) -> None:
    """Run every check of the named families, or of all."""
    torch.set_num_threads(2)
    for name in names or CHECKS:
        for family, check in CHECKS[name]:
            print(f"{name}: {check.__name__}")
            with tempfile.TemporaryDirectory() as folder:
                check(family, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
