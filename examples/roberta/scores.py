"""GLUE's scores: of predictions and labels a number, 1 at best."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import rankdata

Score = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of the predictions that are right."""
    return float(np.mean(predicted == labels))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; zero without any of it."""
    hits = np.sum((predicted == 1) & (labels == 1))
    named = np.sum(predicted == 1) + np.sum(labels == 1)
    return float(2 * hits / named) if named else 0.0


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation; zero of a constant, and of predictions that are not finite.

    Of two binary variables it is Matthews's coefficient.
    """
    x, y = (np.asarray(v, np.float64) - np.mean(v) for v in (predicted, labels))
    norm = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / norm) if np.isfinite(norm) and norm > 0 else 0.0


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation of the ranks, equal values sharing theirs."""
    if not np.all(np.isfinite(predicted)):
        return 0.0
    return pearson(rankdata(predicted), rankdata(labels))


SCORES: Mapping[str, Score] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": pearson,
    "pearson": pearson,
    "spearman": spearman,
}
