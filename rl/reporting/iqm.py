"""Interquartile mean and its bootstrap interval, as in rliable (arXiv 2108.13264)."""

import numpy as np

RESAMPLES = 10_000


def iqm(scores: np.ndarray) -> np.ndarray:
    """Mean of what is left of the last axis after the lowest and the highest quarter (rounded down) are cut off."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1)


def interval(scores: np.ndarray) -> tuple[float, float]:
    """95% stratified bootstrap interval of the IQM of all scores [runs, strata]: runs are redrawn in each stratum."""
    runs, strata = scores.shape
    drawn = np.random.default_rng(0).integers(runs, size=(RESAMPLES, runs, strata))
    resampled = iqm(scores[drawn, np.arange(strata)].reshape(RESAMPLES, -1))
    return tuple(np.percentile(resampled, (2.5, 97.5)))
