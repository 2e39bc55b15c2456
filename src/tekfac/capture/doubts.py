"""What a loss shows to have been done with logits between the model and the softmax.

None of it is seen by the curvature, which is that of the logits as the model returned them. A cross
entropy's gradient is ``w (p − e_y)``: where it has another form that only one cause gives, that can
be said. Other losses whose gradients sum to zero over classes (soft or smoothed targets, focal,
distillation) have none of these forms.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tekfac.capture.likelihoods import SUMS_TO_ZERO, off_zero
from tekfac.numerics import wide

# Terms that are looked at.
SOME = 256

# The probability of a class from which it can't be that only rounding left no gradient.
CLEAR = 1e-3

# How far logarithms of probabilities differ where a power of them can be told, and how exactly that
# is to be met: what a smoothed label leaves comes near to one.
SPREAD, EXACT = 0.1, 2e-3

# How far a gradient's sums over classes are from zero, of their absolute sums, where there was no
# softmax.
FAR = 0.5


def doubt_of(logits: Tensor, gradient: Tensor, dim: int) -> str:
    """What was done with logits outside of the model, "" for nothing that is sure.

    Args:
        logits: as the model returned them.
        gradient: of the loss by them, not all zero.
        dim: the dimension of the classes.
    """
    logits, gradient = logits.movedim(dim, -1), gradient.movedim(dim, -1)
    tiny = torch.finfo(gradient.dtype).tiny
    log_p = F.log_softmax(logits.to(wide(logits.dtype)), -1)
    g = gradient.to(log_p.dtype)
    for axis in range(1, g.dim() - 1):
        if g.shape[axis] > 1 and bool((g == g.narrow(axis, 0, 1)).all()):
            far = (log_p.exp() - log_p.exp().narrow(axis, 0, 1)).abs().max()
            if bool(far > CLEAR):
                return f"its gradient is the same all along dimension {axis}, as a mean's"
    if bool(g.sum(-1).abs().sum() > 1e-2 * g.abs().sum()):
        # Log-probabilities, of which the softmax's gradient is still to be made.
        return ""
    log_p, g = log_p.flatten(0, -2), g.flatten(0, -2)
    there = (g != 0).any(-1).nonzero()[:SOME, 0]
    log_p, g = log_p[there], g[there]
    seen = g.abs().amax(-1, keepdim=True) * log_p.exp() > 10 * tiny
    blind = (g == 0) & (log_p.exp() > CLEAR) & seen
    if bool(blind.any()):
        highest = float(log_p.exp()[blind].max())
        return f"classes that it gives probabilities of up to {highest:.2g} are left out"
    return _power(log_p, g)


def is_no_softmax(logits: Tensor, gradient: Tensor, dim: int) -> bool:
    """Whether a gradient is so far from a softmax's that it can't be one with something added.

    For outputs that are said to be logits. Similarities that are compared along both dimensions, or
    logits with a penalty on them, come near enough to one.
    """
    if bool(logits.to(wide(logits.dtype)).logsumexp(dim).abs().max() < SUMS_TO_ZERO):
        return False  # log-probabilities: the softmax's gradient is still to be made of theirs
    return off_zero(gradient, dim) > FAR


def is_rounding(gradient: Tensor) -> bool:
    """Whether all that there is of a gradient may be rounding: a student's that is its teacher."""
    finest = min(torch.finfo(gradient.dtype).eps, torch.finfo(torch.float32).eps)
    return 0 < float(gradient.abs().max()) * gradient.numel() < 64 * finest


def _power(log_p: Tensor, g: Tensor) -> str:
    """Whether gradients ``(M, C)`` are those of other logits, of which these are a multiple."""
    others = g > 0
    # One label in each term, and more than one other class.
    if g.shape[-1] < 3 or not bool(((g < 0).sum(-1) == 1).all()) or not bool(others.any()):
        return ""
    counts = others.sum(-1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = values.where(others, 0)
        return (values - values.sum(-1, keepdim=True) / counts).where(others, 0)

    x, y = centred(log_p), centred(g.clamp_min(torch.finfo(g.dtype).tiny).log())
    spread = x.square().sum() / others.sum()
    if not bool(spread > SPREAD**2):
        return ""
    slope = (x * y).sum() / x.square().sum()
    missed = (y - slope * x).square().sum() / others.sum()
    # Of a hinge all others' gradients are one.
    plain = bool((slope - 1).abs() < 0.02) or bool(slope < 0.02)
    if plain or bool(missed.sqrt() > EXACT * spread.sqrt()):
        return ""
    return f"it is of that divided by {1 / float(slope):.3g}"
