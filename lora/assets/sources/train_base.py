"""Train the demo's base model with this library: `python -m lora.assets.sources.train_base FOLDER`.

Draws a Qwen2 checkpoint at random, trains all of it on the text of make_text.py by
`lora.finetune(..., method="full")`, and writes it in bfloat16 to lora/assets/demo/base/, beside the tokenizer
that make_tokenizer.py has put there. FOLDER takes the text, the drawn checkpoint and the run.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import lora
from lora.assets.sources.make_text import write_text
from lora.assets.sources.make_tokenizer import BASE, VOCABULARY
from lora.backend import Array, bfloat16, named_stream
from lora.io.checkpoint import open_checkpoint
from lora.io.save_checkpoint import companions, save_checkpoint
from lora.spec import read_spec, tensor_shapes

SEED = 0
END_ID = VOCABULARY - 1
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "max_window_layers": 4,
    "model_type": "qwen2",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": END_ID,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
GENERATION_CONFIG = {
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
    "do_sample": False,
}
SETTINGS: dict[str, Any] = {
    "method": "full",
    "epochs": 2,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "max_seq_len": 256,
    "val_split": 0.01,
    "seed": SEED,
}


def initial_weights() -> dict[str, Array]:
    """Draw weights as Qwen2 starts: norms one, biases zero, the rest normal; float32 by name."""
    scale = CONFIG["initializer_range"]
    return {name: _initial(name, shape, scale) for name, shape in tensor_shapes(read_spec(CONFIG)).items()}


def _initial(name: str, shape: tuple[int, ...], scale: float) -> Array:
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    return named_stream(SEED, name).normal(0, scale, shape).astype(np.float32)


def main() -> None:
    """Train the base in the folder that the command line names, and write it to the demo's."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (BASE / "generation_config.json").write_text(
        json.dumps(GENERATION_CONFIG, indent=2) + "\n", encoding="utf-8"
    )
    write_text(folder / "text.jsonl")
    # float32 at first: an update of a few thousandths would be lost in a bfloat16 weight
    save_checkpoint(folder / "drawn", initial_weights(), CONFIG | {"torch_dtype": "float32"})
    for name, content in companions(BASE).items():
        (folder / "drawn" / name).write_bytes(content)
    run = lora.finetune(
        folder / "drawn", folder / "text.jsonl", task="causal", output=folder / "run", **SETTINGS
    )
    trained = open_checkpoint(run.best).tensors
    narrow = {name: np.asarray(tensor).astype(bfloat16) for name, tensor in trained.items()}
    save_checkpoint(BASE, narrow, CONFIG, source_folder=run.best)


if __name__ == "__main__":
    main()
