"""The learning-rate schedules of the examples."""

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


def warmup_linear(peak: float, steps: int, ratio: float) -> optax.Schedule:
    """Linear warm-up over a ratio of the steps, then linear decay to zero.

    As with `warmup_cosine` the first step moves; so does the last: the rate is zero
    only after it.
    """
    warmup = min(max(1, round(ratio * steps)), steps)
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    fall = optax.linear_schedule(peak, 0.0, steps - warmup + 1)
    return optax.join_schedules([rise, fall], [warmup - 1])
