"""How far sums in floating point may lie from the exact ones on any machine, in any order of summation.

u is the unit roundoff of a type: half the distance from 1 to the next larger number. The bounds are those of N. J.
Higham, Accuracy and Stability of Numerical Algorithms (2nd ed., 2002), chapter 3, and of N. J. Higham and T. Mary,
A New Approach to Probabilistic Rounding Error Analysis (SIAM J. Sci. Comput. 41, 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gamma(num_roundings: int, dtype: torch.dtype) -> float:
    """What so many roundings in a row change at most, as a share of the result: n u / (1 - n u)."""
    nu = num_roundings * torch.finfo(dtype).eps / 2
    assert nu < 0.5, f"{num_roundings} roundings to {dtype} leave nothing to compare"
    return nu / (1 - nu)


def likely_gamma(num_roundings: int, dtype: torch.dtype, failure: float) -> float:
    """What so many roundings in a row change as a share of the result, but with a probability of at most `failure`.

    Roundings are taken as independent and of mean 0. Their logarithms are then a sum that passes lambda sqrt(n) u with
    a probability of 2 exp(-lambda^2 / 2) (Hoeffding; Higham and Mary, Theorem 2.4).
    """
    u = torch.finfo(dtype).eps / 2
    deviations = math.sqrt(2 * math.log(2 / failure))
    return math.expm1(deviations * math.sqrt(num_roundings) * u + num_roundings * u**2 / (1 - u))


def is_plausible(counts: Sequence[int], probabilities: Sequence[float], failure: float) -> bool:
    """Whether independent draws may have fallen so often into each of these classes, which hold all of them.

    False for draws of these probabilities with a probability of at most `failure`. A share that is q in n draws where p
    is due comes with exp(-n kl(q, p)) at most (Chernoff; kl is the divergence of a coin's sides), above or below.
    """
    num_draws = sum(counts)
    limit = math.log(2 * len(counts) / failure)
    return all(num_draws * _divergence(n / num_draws, p) <= limit for n, p in zip(counts, probabilities, strict=True))


def _divergence(q: float, p: float) -> float:
    """kl(q, p) of two coins."""
    pairs = ((q, p), (1 - q, 1 - p))
    return sum(0.0 if a == 0 else math.inf if b <= 0 else a * math.log(a / b) for a, b in pairs)


def product_error(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The most that a @ b summed in `dtype` may lie from the exact product, element by element, for a [m, k], b [k, n].

    Every term is rounded once by its product and at most k - 1 times by sums. A product or sum that leaves the range of
    normal numbers may lose as much as the least of them.
    """
    num_terms = a.shape[-1]
    absolute = a.double().abs() @ b.double().abs()
    # The product that it is compared with is a sum in float64 itself.
    share = gamma(num_terms, dtype) + gamma(num_terms, torch.float64)
    return share * absolute + 2 * num_terms * torch.finfo(dtype).tiny


def assert_within(found: Tensor, exact: Tensor, error: Tensor | float) -> None:
    """`found` is what `exact` (float64) may have become: within `error` of it, then rounded once to its own type."""
    low, high = (exact - error).to(found.dtype), (exact + error).to(found.dtype)
    wrong = ~((low <= found) & (found <= high))
    if bool(wrong.any()):
        worst = ((found.double() - exact).abs() / (torch.as_tensor(error).double().expand_as(exact) + 1e-300))[wrong]
        raise AssertionError(f"{int(wrong.sum())} of {wrong.numel()} elements are too far, by up to {worst.max():.3g}")
