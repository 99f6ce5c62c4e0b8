"""Memory before anything is loaded: what `lora.plan` and `--plan` answer, and how a step cuts its batch."""

from lora.estimate.memory import HOST_ACTIVATION_BYTES, Memory, memory, micro_batch_tokens
from lora.estimate.planning import Plan, Settings, plan
from lora.estimate.workload import Workload

__all__ = [
    "HOST_ACTIVATION_BYTES",
    "Memory",
    "Plan",
    "Settings",
    "Workload",
    "memory",
    "micro_batch_tokens",
    "plan",
]
