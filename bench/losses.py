"""Comparison of loss curves as in DeepSeek-V3's report (arXiv 2412.19437, appendix B.1): smoothed, relative."""

from __future__ import annotations

from collections.abc import Sequence

SMOOTHING = 0.9


def smoothed(curve: Sequence[float]) -> list[float]:
    """Exponential moving average that starts at the first loss."""
    result = [curve[0]]
    for loss in curve[1:]:
        result.append(SMOOTHING * result[-1] + (1 - SMOOTHING) * loss)
    return result


def differences(curve: Sequence[float], baseline: Sequence[float], warm_up_steps: int) -> list[float]:
    """Relative difference of the smoothed losses at each step after the warm-up."""
    pairs = zip(smoothed(curve), smoothed(baseline), strict=True)
    return [(ours - theirs) / theirs for ours, theirs in pairs][warm_up_steps:]
