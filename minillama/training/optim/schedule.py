"""Learning-rate schedule."""

from __future__ import annotations

import math

from minillama.runs.sections import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate: linear warmup to `lr`, then the schedule down to `lr * final_fraction`.

    With W warmup steps (cut to the run's length), S steps in all, u = (step - W) / (S - W) and floor f:

    - `cosine`: lr * (f + (1 - f) * (1 + cos(pi u)) / 2), LLaMA's with f = 0.1 (arXiv 2302.13971, §2.3).
    - `wsd`: lr, and in the last `decay_fraction` of the run linear decay to lr * f (warmup-stable-decay;
      Hu et al. 2024, arXiv 2404.06395, §4).
    - `constant`: lr.
    - `rsqrt`: min(lr, 1 / sqrt(step)) without warmup or floor, PaLM's with lr = 1e-2 (arXiv 2204.02311, §5).

    Args:
        step: 0..S; step 0 of a warmup has rate 0, so the loop asks for step + 1.
        steps: S.
    """
    if config.schedule == "rsqrt":
        return min(config.lr, 1 / math.sqrt(max(1, step)))
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.lr * step / warmup
    if config.schedule == "constant":
        return config.lr
    floor = config.final_fraction
    if config.schedule == "cosine":
        u = (step - warmup) / max(1, steps - warmup)
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * u)))
    decay = max(1, round(steps * config.decay_fraction))
    left = min(1.0, (steps - step) / decay)
    return config.lr * (floor + (1 - floor) * left)
