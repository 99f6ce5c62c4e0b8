"""What `step` measures: a model, a task, the lengths of its rows, and who runs it in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["classify", "causal"]

CLASSES = 5
RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Lengths:
    """How many tokens each row of each batch has."""

    rows: int  # of a batch
    tokens: int  # of a row; where `sigma` is given, the median
    batches: int = 1  # of a round: what is timed as one
    sigma: float | None = None  # of a log-normal distribution; None: every row has `tokens`
    longest: int | None = None  # tokens at which a row is cut


@dataclass(frozen=True)
class Contestant:
    """A library in one precision."""

    library: Literal["lora", "peft", "peft-liger"]
    dtype: Literal["float32", "bfloat16"]

    @property
    def name(self) -> str:
        """How tables and records call it."""
        return f"{self.library}-{self.dtype}"


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    model: str  # a key of `models.CONFIGS`
    task: Task
    lengths: Lengths
    contestants: tuple[Contestant, ...]  # the first is ours; ratios are taken against it
    targets: str = "qv"  # of the adapter: a shorthand of `lora.LoraConfig.target_modules`
    device: Literal["cpu", "cuda"] = "cpu"
    later: str | None = None  # why it cannot be measured in this version


OURS = Contestant("lora", "float32")
PEER = Contestant("peft", "float32")
PEER_HALF = Contestant("peft", "bfloat16")
GPU = tuple(Contestant(library, "bfloat16") for library in ("lora", "peft", "peft-liger"))  # type: ignore[arg-type]

# the traffic of a classifier of short texts: median 60 tokens, a long tail, cut where `finetune` cuts
REALISTIC = Lengths(rows=8, tokens=60, batches=8, sigma=0.8, longest=512)


def _gpu(name: str, rows: int, tokens: int, **fields: Any) -> Case:
    return Case(f"cuda-{name}", "qwen2.5-0.5b", "causal", Lengths(rows, tokens), GPU, device="cuda", **fields)


SMOKE = "smoke"  # shows that both sides run and agree; its times mean nothing
CASES = (
    Case(SMOKE, "qwen2.5-tiny", "causal", Lengths(2, 16), (OURS, PEER)),
    Case("classify-8x128", "qwen2.5-0.5b", "classify", Lengths(8, 128), (OURS, PEER)),
    Case("causal-4x256", "qwen2.5-0.5b", "causal", Lengths(4, 256), (OURS, PEER)),
    Case("qwen3.5-causal-4x256", "qwen3.5-small", "causal", Lengths(4, 256), (OURS, PEER)),
    Case("classify-realistic", "qwen2.5-0.5b", "classify", REALISTIC, (OURS, PEER, PEER_HALF)),
    _gpu("causal-1k", 1, 1024),
    _gpu("causal-4k", 1, 4096),
    _gpu("causal-16k", 1, 16384),
    Case(
        "cuda-qwen3.5-causal-4k",
        "qwen3.5-small",
        "causal",
        Lengths(1, 4096),
        GPU,
        device="cuda",
        later="Qwen3.5 has no CUDA kernels in this version",
    ),
)
