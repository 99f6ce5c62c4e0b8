"""The learning rate over a run: linear warm-up, then half a cosine down to a floor."""

from __future__ import annotations

import math

FLOOR = 1e-6  # where the cosine ends, unless the peak is lower


def warmup_cosine(step: int, total_steps: int, *, peak: float, warmup: float) -> float:
    """Return the learning rate of `step`, counted from 0 to total_steps - 1.

    The first step is never zero, so that no batch is spent on a step of no size.

    Args:
        step: the optimizer step.
        total_steps: of the whole run.
        peak: the highest rate, reached at the end of the warm-up.
        warmup: share of the run that is warm-up, in [0, 1); rounded up to whole steps.
    """
    rising = math.ceil(warmup * total_steps)
    if step < rising:
        return peak * (step + 1) / rising
    floor = min(FLOOR, peak)
    progress = (step - rising) / max(1, total_steps - 1 - rising)
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
