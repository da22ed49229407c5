"""Blocks along the last dimension."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.property.block import (
    along_last,
)

# --- along the last dimension ---------------------------------------------------------------------

along_last("softmax", lambda h, scale: (h * scale).softmax(-1), scale=(1.0, 10.0, 100.0))
along_last("log_softmax", lambda h: h.log_softmax(-1))
along_last("logsumexp", lambda h: h - h.logsumexp(-1, keepdim=True))
along_last("softmin", lambda h: F.softmin(h, -1))
along_last("softmax by hand", lambda h: h.exp() / h.exp().sum(-1, keepdim=True))
along_last("softmax, masked", lambda h: h.masked_fill(mask_of(h), -math.inf).softmax(-1))
along_last(
    "softmax, mask computed", lambda h: h.masked_fill((h < -1) & mask_of(h), -math.inf).softmax(-1)
)
along_last("softmax, mask added", lambda h: (h + mask_of(h) * -1e30).softmax(-1))
along_last("layer norm", lambda h, eps: F.layer_norm(h, h.shape[-1:], eps=eps), eps=(1e-5, 1e-12))
along_last("rms norm", lambda h: F.rms_norm(h, h.shape[-1:]))
along_last(
    "norm by hand",
    lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 0.1).sqrt(),
)
along_last("unit length", lambda h: F.normalize(h, dim=-1))
along_last("vector norm", lambda h, p: h * h.norm(p, -1, keepdim=True), p=(1, 2, 3, math.inf))
along_last("standard deviation", lambda h: h * h.std(-1, correction=0, keepdim=True))
along_last("largest", lambda h: h - h.amax(-1, keepdim=True))
along_last("smallest", lambda h: h * h.min(-1, keepdim=True).values)
along_last("cumulative sum", lambda h: h.cumsum(-1).tanh())
along_last("cumulative product", lambda h: (1 + 0.3 * h.tanh()).cumprod(-1))
along_last("cumulative maximum", lambda h: h.cummax(-1).values)
along_last("cumulative logsumexp", lambda h: h.logcumsumexp(-1))
along_last("sorted", lambda h: h.sort(-1).values)
along_last("topk", lambda h: h + h.topk(1, -1).values)
along_last("ranked", lambda h: h.gather(-1, h.argsort(-1)))
along_last("chosen by argmax", lambda h: h.sin().gather(-1, h.argmax(-1, keepdim=True)) + h)
along_last("median", lambda h: h - h.median(-1, keepdim=True).values)
along_last("ties", lambda h: h.amin(-1, keepdim=True).expand_as(h).maximum(h.mean(-1, True)))
along_last("flipped", lambda h: h.flip(-1) + 0.5 * h)
along_last("rolled", lambda h: h.roll(1, -1) * h)
along_last("spectrum", lambda h: torch.fft.fft(h).abs())
along_last("phase turned", lambda h: torch.fft.ifft(torch.fft.fft(h) * 1j).imag)
along_last("outer product", lambda h: (h.unsqueeze(-1) * h.unsqueeze(-2)).mean(-1))
along_last("padded", lambda h: F.pad(h, (1, 1), value=0.5).unfold(-1, 3, 1).amax(-1))
along_last("broadcast", lambda h: h[..., :1] * h[..., -1:] + h)
along_last("written in slices", lambda h: write_slices(h))
along_last("rows by mask", lambda h: update_rows(h.clone(), h[..., 0] > h[..., -1]))
along_last("cross attention", lambda a, b: attend(a, b), arity=2)


def mask_of(h: Tensor) -> Tensor:
    """Return a mask that is True for one feature in three, and never for the first."""
    return torch.arange(h.shape[-1]) % 3 == 1


def write_slices(h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    half = (h.shape[-1] + 1) // 2
    y[..., :half] = h[..., :half].tanh()
    y[..., half:] += h[..., half:] * 2
    y[..., ::2].mul_(0.5)
    return y


def update_rows(h: Tensor, mask: Tensor) -> Tensor:
    h[mask] = F.silu(h[mask]) * h[mask].softmax(-1)
    return h


def attend(a: Tensor, b: Tensor) -> Tensor:
    """Attention with a score of one number between every two features."""
    scores = a.unsqueeze(-1) * b.unsqueeze(-2)
    return (scores.softmax(-1) @ b.unsqueeze(-1)).squeeze(-1)
