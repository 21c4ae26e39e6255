"""The algorithms transcribed from their formulas, in float64 NumPy.

Nothing here knows the library: the tests compare it with these. All functions take
gradients of shape ``(*batch, m, n)``, one a step, and return one direction a step: what
a learning rate is multiplied with and subtracted from the weights.
"""

import numpy as np


def wide(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def adam(grads, b1=0.9, b2=0.999, eps=1e-8) -> list[np.ndarray]:
    """Adam (Kingma & Ba, Algorithm 1), epsilon outside of the corrected root."""
    m = v = 0.0
    directions = []
    for t, g in enumerate(map(wide, grads), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        directions.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return directions


def lion(grads, b1=0.9, b2=0.99) -> list[np.ndarray]:
    """Lion (Chen et al. 2023): the sign of one average, the state of another."""
    m = 0.0
    directions = []
    for g in map(wide, grads):
        directions.append(np.sign(b1 * m + (1 - b1) * g))
        m = b2 * m + (1 - b2) * g
    return directions


def top_singular(g, rank) -> np.ndarray:
    """The leading left singular vectors, ``(*batch, m, rank)``, in descending order."""
    return np.linalg.svd(wide(g), full_matrices=False)[0][..., :rank]


def truncate(a, rank) -> np.ndarray:
    """The best approximation of at most this rank."""
    u, s, vt = np.linalg.svd(wide(a), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def rotate(m, v, overlap) -> tuple[np.ndarray, np.ndarray]:
    """Moments in a new basis, ``C m`` and ``(C o C) v / c``, with ``C = new^T old``.

    ``c`` is what the old basis covers of a new direction, a tenth at the least.
    """
    c = wide(overlap)
    covered = np.sum(c**2, axis=-1, keepdims=True)
    return c @ wide(m), c**2 @ wide(v) / np.maximum(covered, 0.1)


def galore_adam(
    grads, bases, scale=1.0, transfer="keep", b1=0.9, b2=0.999, eps=1e-8
) -> list[np.ndarray]:
    """GaLore with Adam, the basis on the left.

    Args:
      grads: one a step.
      bases: ``{step: basis}`` of shape (*batch, m, r), for the steps that refresh;
        step 0 must be among them.
      scale: multiplies ``P N``.
      transfer: "keep", "rotate" or "reset" what the moments are at a refresh.
    """
    basis = m = v = None
    directions = []
    for step, g in enumerate(map(wide, grads)):
        if step in bases:
            old, basis = basis, wide(bases[step])
            if old is None or transfer == "reset":
                m = v = np.zeros_like(basis.mT @ g)
            elif transfer == "rotate":
                m, v = rotate(m, v, basis.mT @ old)
        r = basis.mT @ g
        m = b1 * m + (1 - b1) * r
        v = b2 * v + (1 - b2) * r**2
        t = step + 1
        n = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        directions.append(scale * basis @ n)
    return directions


def clamp(v) -> np.ndarray:
    """Equation (2) of MLorc: negative entries become their mean magnitude.

    The mean is over the negative entries of each matrix; exact zeros stay zero.
    """
    v = wide(v)
    negative = v < 0
    count = negative.sum(axis=(-2, -1), keepdims=True)
    total = np.abs(v * negative).sum(axis=(-2, -1), keepdims=True)
    zeta = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    return np.maximum(v, 0) + zeta * negative


def mlorc_adam(
    grads, rank, b1=0.8, b2=0.999, eps=1e-8, compress=("mu", "nu")
) -> list[np.ndarray]:
    """MLorc-AdamW (Algorithm 1), its RSVD replaced by the exact truncated SVD.

    A moment that ``compress`` does not name stays as it is (MLorc_m, MLorc_v). What
    exceeds the largest update of Adam itself is cut off.
    """
    m = v = np.zeros_like(wide(grads[0]))
    most = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))
    directions = []
    for t, g in enumerate(map(wide, grads), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * (clamp(v) if "nu" in compress else v) + (1 - b2) * g**2
        direction = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        directions.append(np.clip(direction, -most, most))
        m = truncate(m, rank) if "mu" in compress else m
        v = truncate(v, rank) if "nu" in compress else v
    return directions


def mlorc_lion(grads, rank, b1=0.9, b2=0.99) -> list[np.ndarray]:
    """MLorc-Lion (Algorithm 2), its RSVD replaced by the exact truncated SVD."""
    m = np.zeros_like(wide(grads[0]))
    directions = []
    for g in map(wide, grads):
        directions.append(np.sign(b1 * m + (1 - b1) * g))
        m = truncate(b2 * m + (1 - b2) * g, rank)
    return directions
