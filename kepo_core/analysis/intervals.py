"""95 % intervals of proportions and means, each from its published formula. Pure functions of numbers.

Notation: x_i is the i-th of n values (for correctness 0 or 1), K the number of distinct images, M the number of
modalities.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

Interval = tuple[float, float]

_Z = float(stats.norm.ppf(0.975))  # the two-sided normal quantile


def percent(value: float, low: float, high: float, *, sign: str = "") -> str:
    """In per cent or points, for reading: ``61.3 [55.7, 66.7]``; ``sign`` "+" shows every sign."""
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def wilson_interval(successes: float, n: float) -> Interval:
    """Wilson's score interval for a proportion p̂ = successes / n (Wilson 1927).

        (p̂ + z²/2n ± z √(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n)

    ``n`` may be an effective number, not an integer. Raises ``ValueError`` unless 0 ≤ successes ≤ n and n > 0.
    """
    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"successes, n: {successes} of {n}, expected 0 ≤ successes ≤ n and n > 0.")
    z, p = _Z, successes / n
    centre = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # p̂ is inside, also after rounding at 0 and 1


def design_effect(values: ArrayLike, clusters: ArrayLike) -> float:
    """The factor by which the variance of a mean grows because values of one cluster are similar; at least 1.

        deff = [ K/(K-1) Σ_k (Σ_{i∈k} (x_i - x̄))² ] / [ n/(n-1) Σ_i (x_i - x̄)² ]

    ``values`` (n,), ``clusters`` (n,) the cluster (image) of each. Both variances are of the same mean, from the
    linearised cluster estimator and from independent sampling; n / deff is the effective number of values. It is 1 if
    all values are equal, or each has a cluster of its own; values below 1 become 1: intervals never shrink.
    """
    x, of = np.asarray(values, dtype=float), np.asarray(clusters)
    if len(x) != len(of):
        raise ValueError(f"clusters: {len(of)} for {len(x)} values, expected one per value.")
    _, index = np.unique(of, return_inverse=True)
    n, k = len(x), int(index.max()) + 1
    centred = x - x.mean()
    independent = n / max(n - 1, 1) * float(np.sum(centred**2))
    if independent == 0 or k == 1 or k == n:
        return 1.0
    clustered = k / (k - 1) * float(np.sum(np.bincount(index, weights=centred) ** 2))
    return max(1.0, clustered / independent)


def mean_interval(estimates: ArrayLike, intervals: Sequence[Interval]) -> tuple[float, float, float]:
    """Mean of M independent estimates θ_m with intervals (l_m, u_m) → (mean, low, high).

        low = θ̄ - √(Σ_m (θ_m - l_m)²) / M,   high = θ̄ + √(Σ_m (u_m - θ_m)²) / M

    Source: Zou & Donner 2008, "method of variance estimates recovery". Unlike a normal interval it keeps the
    asymmetry of its parts, and has width even if every estimate is 0 or 1.
    """
    theta = np.asarray(estimates, dtype=float)
    low, high = np.asarray(intervals, dtype=float).T
    mean = float(theta.mean())
    down = float(np.sqrt(np.sum((theta - low) ** 2)) / len(theta))
    up = float(np.sqrt(np.sum((high - theta) ** 2)) / len(theta))
    return mean, mean - down, mean + up


def difference_interval(gained: float, lost: float, n: float) -> Interval:
    """Interval for the difference of two paired proportions, (gained - lost) / n.

        d̃ = (g - l)/(n + 2),  ṽ = ((g + l + 2)/(n + 2) - d̃²)/(n + 2),  d̃ ± z √ṽ

    where g and l count discordant pairs. Source: Bonett & Price 2012 (adjusted Wald: one is added to each discordant
    cell, which gives it width even if nothing changed). It is widened, if necessary, to contain the estimate.
    """
    d = (gained - lost) / (n + 2)
    variance = ((gained + lost + 2) / (n + 2) - d**2) / (n + 2)
    half = _Z * float(np.sqrt(variance))
    estimate = (gained - lost) / n
    return max(-1.0, min(d - half, estimate)), min(1.0, max(d + half, estimate))
