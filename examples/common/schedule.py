"""The learning-rate schedule of the examples."""

import optax


def warmup_cosine(peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth of the steps, then cosine decay to a tenth.

    The first step already moves: the rate of step 0 is not zero but one warm-up
    step's worth.
    """
    warmup = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak / 10,
    )
