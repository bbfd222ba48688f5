"""Statistics of few runs, as in rliable (arXiv 2108.13264), whose package does not import beside pandas 3.

Scores are [runs, strata]. An interval is a 95% bootstrap interval, for which runs are redrawn in each stratum.
"""

import numpy as np

RESAMPLES = 10_000
CURVE_RESAMPLES = 1000  # at each of a curve's many points


def iqm(scores: np.ndarray) -> np.ndarray:
    """Mean of what is left of the last axis after the lowest and the highest quarter (rounded down) are cut off."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1)


def interval(scores: np.ndarray) -> tuple[float, float]:
    """Interval of the IQM of all scores."""
    drawn = _redraw(np.random.default_rng(0), scores)
    resampled = iqm(scores[drawn, np.arange(scores.shape[1])].reshape(RESAMPLES, -1))
    return tuple(np.percentile(resampled, (2.5, 97.5)))


def improvement(scores: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """Probability that one of the scores is higher than one of the others, mean over strata, and its interval.

    A tie counts one half.
    """
    difference = scores[:, None] - others  # [runs, other runs, strata]
    higher = (difference > 0) + 0.5 * (difference == 0)
    rng = np.random.default_rng(0)
    one, other = _redraw(rng, scores)[:, :, None], _redraw(rng, others)[:, None]
    resampled = higher[one, other, np.arange(scores.shape[1])].mean((1, 2, 3))
    return higher.mean(), *np.percentile(resampled, (2.5, 97.5))


def profile(scores: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of all scores that is higher than each level, and its interval [2, levels]."""
    higher = scores[..., None] > levels  # [runs, strata, levels]
    drawn = _redraw(np.random.default_rng(0), scores, CURVE_RESAMPLES)
    resampled = higher[drawn, np.arange(scores.shape[1])].mean((1, 2))
    return higher.mean((0, 1)), np.percentile(resampled, (2.5, 97.5), axis=0)


def band(curves: np.ndarray) -> np.ndarray:
    """Interval [2, points] of the IQM of curves [runs, points]; whole curves are redrawn."""
    runs = len(curves)
    drawn = np.random.default_rng(0).integers(runs, size=(CURVE_RESAMPLES, runs))
    return np.percentile(iqm(curves.T[:, drawn]), (2.5, 97.5), axis=1)


def _redraw(rng: np.random.Generator, scores: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """Numbers of runs [resamples, runs, strata]."""
    return rng.integers(len(scores), size=(resamples, *scores.shape))
