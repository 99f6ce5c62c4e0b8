"""The operations of `kernels` in PyTorch, cuDNN and Liger: calls and outputs have the names of `bench_*.py`.

Each is what a user of that library writes: eager PyTorch, its own SDPA backends, Liger's functions. Gradients
are those of activations alone, as a LoRA step asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bench_adamw import CLIP, SETTINGS
from benchmarks.bench_lowrank_linear import SCALE, count
from benchmarks.bench_rmsnorm import EPS
from benchmarks.registry import Calls

Tensors = Mapping[str, torch.Tensor]
Outputs = dict[str, torch.Tensor]


def differentiated(
    forward: Callable[..., Outputs], inputs: Outputs, cotangents: tuple[torch.Tensor, ...]
) -> Calls:
    """Return the calls of `forward`, a function of `inputs`: itself, and the gradients for them by autograd.

    Libraries write over inputs, saved values and cotangents, so each call has its own copies.
    """
    alone = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    outputs = tuple(forward(**alone).values())

    def backward() -> Outputs:
        found = torch.autograd.grad(outputs, tuple(alone.values()), given, retain_graph=True)
        return dict(zip((f"d{name}" for name in alone), found, strict=True))

    given = tuple(d.clone() for d in cotangents)
    kept = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    return {"forward": lambda: forward(**kept), "backward": backward}


def rmsnorm(a: Tensors) -> Calls:
    """PyTorch: an addition and F.rms_norm."""

    def forward(x: torch.Tensor) -> Outputs:
        stream = x + a["residual"]
        return {"y": functional.rms_norm(stream, x.shape[1:], a["weight"], EPS), "stream": stream}

    return differentiated(forward, {"x": a["x"]}, (a["dy"], a["dstream"]))


def rmsnorm_liger(a: Tensors) -> Calls:
    """Liger: addition and norm in one."""
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    def forward(x: torch.Tensor) -> Outputs:
        y, stream = liger_fused_add_rms_norm(x, a["residual"], a["weight"], EPS)
        return {"y": y, "stream": stream}

    return differentiated(forward, {"x": a["x"]}, (a["dy"], a["dstream"]))


def rope(a: Tensors) -> Calls:
    """PyTorch, as Transformers writes it: the halves swapped, two products and a sum."""
    cos, sin = (torch.cat((a[name], a[name]), -1)[:, None].to(a["q"].dtype) for name in ("cos", "sin"))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def forward(q: torch.Tensor, k: torch.Tensor) -> Outputs:
        return {"q": rotated(q), "k": rotated(k)}

    return differentiated(forward, {"q": a["q"], "k": a["k"]}, (a["dq"], a["dk"]))


def rope_liger(a: Tensors) -> Calls:
    """Liger: in place, on [1, heads, tokens, width] views."""
    from liger_kernel.transformers.functional import liger_rope

    cos, sin = (torch.cat((a[name], a[name]), -1)[None].to(a["q"].dtype) for name in ("cos", "sin"))

    def forward(q: torch.Tensor, k: torch.Tensor) -> Outputs:
        rotated = liger_rope(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
        return dict(zip(("q", "k"), (x.transpose(1, 2)[0] for x in rotated), strict=True))

    return differentiated(forward, {"q": a["q"], "k": a["k"]}, (a["dq"], a["dk"]))


def swiglu(a: Tensors) -> Calls:
    """PyTorch: F.silu and a product."""

    def forward(gate: torch.Tensor, up: torch.Tensor) -> Outputs:
        return {"y": functional.silu(gate) * up}

    return differentiated(forward, {"gate": a["gate"], "up": a["up"]}, (a["dy"],))


def swiglu_liger(a: Tensors) -> Calls:
    """Liger: one kernel each way; its backward writes over what was saved."""
    from liger_kernel.transformers.functional import liger_swiglu

    def forward(gate: torch.Tensor, up: torch.Tensor) -> Outputs:
        return {"y": liger_swiglu(gate, up)}

    return differentiated(forward, {"gate": a["gate"], "up": a["up"]}, (a["dy"],))


def embedding(a: Tensors) -> Calls:
    """PyTorch: F.embedding; the gradient of a bfloat16 table is bfloat16."""
    table = a["table"].clone().requires_grad_()
    x = functional.embedding(a["ids"], table)
    return {
        "forward": lambda: {"x": functional.embedding(a["ids"], a["table"])},
        "backward": lambda: {"dtable": torch.autograd.grad(x, table, a["dx"], retain_graph=True)[0]},
    }


def softmax_xent(a: Tensors) -> Calls:
    """PyTorch: F.linear, float32 logits and F.cross_entropy, as Transformers does it."""
    return _loss_and_gradient(
        a,
        lambda hidden: functional.cross_entropy(functional.linear(hidden, a["weight"]).float(), a["targets"]),
    )


def softmax_xent_liger(a: Tensors) -> Calls:
    """Liger: head and loss fused, in chunks."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _loss_and_gradient(
        a, lambda hidden: liger_fused_linear_cross_entropy(hidden, a["weight"], a["targets"])
    )


def attention(backend: SDPBackend) -> Callable[[Tensors], Calls]:
    """PyTorch's SDPA by one backend, heads of one key-value group shared by the backend itself."""

    def calls(a: Tensors) -> Calls:
        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Outputs:
            heads_first = (x[None].transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                o = functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            return {"o": o.transpose(1, 2)[0]}

        return differentiated(forward, {name: a[name] for name in "qkv"}, (a["do"],))

    return calls


def cached_attention(a: Tensors) -> Calls:
    """PyTorch's SDPA by the backend that it takes itself."""
    q, keys, values = a["q"][:, :, None], *(a[name].transpose(1, 2) for name in ("keys", "values"))

    def forward() -> Outputs:
        o = functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return {"o": o[:, :, 0]}

    return {"forward": forward}


def lowrank_linear(a: Tensors) -> Calls:
    """PyTorch, as PEFT writes it, with the adapters in bfloat16: the faster of its two precisions."""
    numbers = range(count(a))
    trained = {f"{name}{n}": a[f"{name}{n}"].bfloat16() for n in numbers for name in "ab"}

    def forward(x: torch.Tensor, **factors: torch.Tensor) -> Outputs:
        ys = {}
        for n in numbers:
            low = functional.linear(x, factors[f"a{n}"])
            base = functional.linear(x, a[f"weight{n}"], a[f"bias{n}"])
            ys[f"y{n}"] = base + SCALE * functional.linear(low, factors[f"b{n}"])
        return ys

    return differentiated(forward, {"x": a["x"], **trained}, tuple(a[f"dy{n}"] for n in numbers))


def adamw(a: Tensors) -> Calls:
    """PyTorch: clip_grad_norm_ over all, and fused AdamW, in the middle of a run."""
    parameters = [torch.nn.Parameter(each) for each in a["parameters"]]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=SETTINGS["lr"],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["eps"],
        weight_decay=SETTINGS["weight_decay"],
        fused=True,
    )
    for parameter, gradient, m, v in zip(parameters, a["gradients"], a["m"], a["v"], strict=True):
        parameter.grad = gradient
        steps = torch.tensor(9.0, device=parameter.device)  # so the next is step 10
        optimizer.state[parameter] = {"step": steps, "exp_avg": m, "exp_avg_sq": v}

    def step() -> Outputs:
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return {"norm": norm, **{name: a[name] for name in ("parameters", "m", "v")}}

    return {"step": step}


def _loss_and_gradient(a: Tensors, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> Calls:
    hidden = a["hidden"].clone().requires_grad_()

    def loss_and_gradient() -> Outputs:
        loss = loss_of(hidden)
        return {"loss": loss.detach(), "dhidden": torch.autograd.grad(loss, hidden)[0]}

    return {"loss and gradient": loss_and_gradient}


PEERS: dict[str, dict[str, Callable[[Tensors], Calls]]] = {
    "rmsnorm": {"torch": rmsnorm, "liger": rmsnorm_liger},
    "rope": {"torch": rope, "liger": rope_liger},
    "swiglu": {"torch": swiglu, "liger": swiglu_liger},
    "embedding": {"torch": embedding},
    "softmax_xent": {"torch": softmax_xent, "liger": softmax_xent_liger},
    "attention": {
        "sdpa-flash": attention(SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": attention(SDPBackend.CUDNN_ATTENTION),
    },
    "cached_attention": {"sdpa": cached_attention},
    "lowrank_linear": {"torch": lowrank_linear},
    "adamw": {"torch": adamw},
}
