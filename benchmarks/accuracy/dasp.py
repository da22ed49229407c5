"""DASP: approximate Shapley values by propagating distributions (Ancona et al. 2019).

Ancona, Oztireli and Gross, "Explaining Deep Neural Networks with a Polynomial Time Algorithm for
Shapley Values Approximation", ICML 2019, arXiv:1903.10992. The Shapley value of a feature is the
mean over the coalition sizes k of its mean contribution to coalitions of k others. Instead of
drawing coalitions, DASP takes what a layer receives for normally distributed, with the mean and
variance over all coalitions of that size, and propagates both through the network:

- The sum of k of N terms v_j, drawn without replacement, has the mean k mean(v) and the variance
  k (N - k) / (N - 1) (mean(v^2) - mean(v)^2): equations 10 and 11.
- Linear layers weight means with W and variances with W^2. ReLU has closed moments, and maxima
  those of Clark (1961), one after another, as in the lightweight probabilistic networks of Gast and
  Roth (2018) that the paper uses.

The paper has dense and convolutional layers, ReLU, and max and average pooling. Other functions of
one number get their moments by Gauss-Hermite quadrature here, and products those of independent
factors. Everything else (softmax, norms, recurrent layers) raises: there is no such layer in the
paper. Features are replaced by a reference, so the terms are v_j = w_j (x_j - r_j). All N coalition
sizes are used, which takes 2 N^2 rows, or K of them that are evenly spaced, which takes 2 N K.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from benchmarks import adapters
from benchmarks.programs import bound_program
from fxshap.ops.frozen import frozen_batch_norm, frozen_convolution
from fxshap.ops.library import BATCH_NORM

aten = torch.ops.aten
#: Points of the quadrature.
POINTS = 16
#: Rows that are propagated together.
ROWS_AT_ONCE = 512
#: What pads the windows of a maximum.
LOWEST = -1e30


class Moments(NamedTuple):
    """What is known of a random value.

    Attributes
    ----------
    mean : Tensor
    variance : Tensor
        Of terms that are drawn independently.
    shared : Tensor or None
        The square of this is taken off the variance: terms drawn without replacement are
        negatively correlated. It passes through linear operations like the mean.
    """

    mean: Tensor
    variance: Tensor
    shared: Tensor | None = None

    def independent(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the whole variance."""
        if self.shared is None:
            return self.mean, self.variance
        return self.mean, (self.variance - self.shared.square()).clamp(min=0)


def map_moments(x: Moments, linear: Callable[[Tensor], Tensor], squared: Any = None) -> Moments:
    """Apply a linear function without offset, and the function of squared weights to variances."""
    shared = None if x.shared is None else linear(x.shared)
    return Moments(linear(x.mean), (squared or linear)(x.variance), shared)


def from_normal(mean: Tensor, variance: Tensor, f: Callable[[Tensor], Tensor]) -> Moments:
    """Return the moments of a function of a normal variable, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(POINTS)
    deviation = variance.sqrt()
    values = torch.stack([f(mean + node * deviation) for node in nodes])
    w = torch.as_tensor(weights / weights.sum()).to(mean).reshape(-1, *[1] * mean.dim())
    first = (w * values).sum(0)
    return Moments(first, (w * (values - first).square()).sum(0))


def relu(mean: Tensor, variance: Tensor) -> Moments:
    """Return the moments of a rectified normal variable (Gast and Roth 2018, eq. 10)."""
    deviation = variance.sqrt()
    ratio = mean / deviation.clamp(min=1e-30)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    below = (1 + torch.erf(ratio / math.sqrt(2))) / 2
    first = mean * below + deviation * density
    second = (mean.square() + variance) * below + mean * deviation * density
    return Moments(first, (second - first.square()).clamp(min=0))


def maximum(a: Moments, b: Moments) -> Moments:
    """Return the moments of the maximum of two independent normal variables (Clark 1961)."""
    (m_a, v_a), (m_b, v_b) = a.independent(), b.independent()
    spread = (v_a + v_b).sqrt().clamp(min=1e-30)
    ratio = (m_a - m_b) / spread
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    above = (1 + torch.erf(ratio / math.sqrt(2))) / 2
    first = m_a * above + m_b * (1 - above) + spread * density
    second = (m_a.square() + v_a) * above + (m_b.square() + v_b) * (1 - above)
    second = second + (m_a + m_b) * spread * density
    return Moments(first, (second - first.square()).clamp(min=0))


def maximum_over(x: Moments, dim: int) -> Moments:
    """Return the moments of the maximum over a dimension, one element after another."""
    parts = [Moments(*pair) for pair in zip(*(t.unbind(dim) for t in x.independent()), strict=True)]
    largest = parts[0]
    for part in parts[1:]:
        largest = maximum(largest, part)
    return largest


def max_pool(
    dims: int, x: Moments, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, *_: Any
) -> Moments:
    """Return the moments of max pooling, one dimension after another."""

    def of_dims(value: Any, default: Any) -> list[int]:
        given = list(np.atleast_1d(value)) or list(np.atleast_1d(default))
        return [int(v) for v in given] * (dims // len(given))

    if any(d != 1 for d in of_dims(dilation, 1)):
        raise NotImplementedError("max pooling with dilation")
    windows = zip(of_dims(size, 1), of_dims(stride, size), of_dims(padding, 0), strict=True)
    mean, variance = x.independent()
    for position, (k, step, p) in enumerate(windows):
        dim = mean.dim() - dims + position
        pad = [0, 0] * (mean.dim() - 1 - dim) + [p, p]
        window = Moments(
            nn.functional.pad(mean, pad, value=LOWEST).unfold(dim, k, step),
            nn.functional.pad(variance, pad).unfold(dim, k, step),
        )
        mean, variance = maximum_over(window, -1).independent()
    return Moments(mean, variance)


def product(a: Moments, b: Moments) -> Moments:
    """Return the moments of a product of independent factors."""
    (m_a, v_a), (m_b, v_b) = a.independent(), b.independent()
    return Moments(m_a * m_b, v_a * m_b.square() + v_b * m_a.square() + v_a * v_b)


def plus(a: Moments, b: Moments, sign: float = 1) -> Moments:
    """Return the moments of a sum or difference of independent terms."""
    if a.shared is not None and b.shared is not None:
        shared = a.shared + sign * b.shared
        return Moments(a.mean + sign * b.mean, a.variance + b.variance, shared)
    (m_a, v_a), (m_b, v_b) = a.independent(), b.independent()
    return Moments(m_a + sign * m_b, v_a + v_b)


#: Operations that only move or copy values, or sum them.
STRUCTURAL = {
    getattr(aten, name)
    for name in (
        "view reshape permute transpose unsqueeze squeeze expand slice select flatten t"
        " clone contiguous _to_copy alias detach unflatten sum movedim split chunk split_with_sizes"
        " unbind constant_pad_nd repeat flip roll index"
        " index_select"
    ).split()
    if hasattr(aten, name)
}


#: Operations whose result depends on the shape only.
OF_SHAPES = {aten.sym_size, aten.new_zeros, aten.zeros_like, aten.new_full, aten.ones_like}


class Propagation(fx.Interpreter):
    """Runs a captured graph on moments, where values depend on the input."""

    def run_node(self, node: fx.Node) -> Any:
        """Run one node."""
        if node.op != "call_function":
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if not any(isinstance(a, Moments) for a in flat(args, kwargs)):
            return super().run_node(node)
        if node.target is operator.getitem:
            return args[0][args[1]]
        return propagate(node.target, args, kwargs)


def flat(args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments, with those in lists."""
    values = [*args, *kwargs.values()]
    nested = (
        a if isinstance(a, list | tuple) and not isinstance(a, Moments) else [a] for a in values
    )
    return [v for each in nested for v in each]


def propagate(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the moments of the result of one operation."""
    op = getattr(target, "overloadpacket", target)
    x, *rest = args
    if op in OF_SHAPES:
        return target(x.mean, *rest, **kwargs)
    if op in STRUCTURAL:
        return rearrange(lambda t: target(t, *rest, **kwargs), x)
    if op is aten.cat:
        return concatenate(x, *rest)
    if op in (aten.linear, aten.mm, aten.matmul, aten.addmm, frozen_convolution, frozen_batch_norm):
        return weighted(op, args)
    if target is BATCH_NORM:
        return weighted(frozen_batch_norm, args)
    if op in MEANS:
        return averaged(lambda t: target(t, *rest, **kwargs), x)
    if op in MAX_POOLS:
        return max_pool(MAX_POOLS[op], x, *rest)
    if op is aten.amax and rest and len(rest[0]) == 1 and rest[1:] in ([], [False]):
        return maximum_over(x, rest[0][0])
    if target is aten.max.dim:
        return maximum_over(x, rest[0]), None
    if op in (aten.add, aten.sub) and not kwargs:
        return added(1.0 if op is aten.add else -1.0, *args)
    if op is aten.mul or (op is aten.div and not isinstance(rest[0], Moments)):
        return multiplied(target, *args)
    if op is aten.neg:
        return map_moments(x, torch.neg, lambda t: t)
    if op is aten.relu:
        return relu(*x.independent())
    varying = [a for a in flat(args, kwargs) if isinstance(a, Moments)]
    if len(varying) == 1 and x is varying[0] and torch.Tag.pointwise in getattr(target, "tags", ()):
        return from_normal(*x.independent(), lambda t: target(t, *rest, **kwargs))
    raise NotImplementedError(f"DASP has no probabilistic layer for {target}")


MEANS = {
    aten.mean, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d,
}  # fmt: skip
MAX_POOLS = {aten.max_pool1d: 1, aten.max_pool2d: 2, aten.max_pool3d: 3}


def rearrange(f: Callable[[Tensor], Any], x: Moments) -> Any:
    """Apply an operation that moves values, to each moment."""
    parts = [None if t is None else f(t) for t in x]
    if isinstance(parts[0], list | tuple):
        return [Moments(m, v, None if parts[2] is None else parts[2][k])
                for k, (m, v) in enumerate(zip(parts[0], parts[1], strict=True))]  # fmt: skip
    return Moments(*parts)


def averaged(f: Callable[[Tensor], Tensor], x: Moments) -> Moments:
    """Return the moments of a mean, whose weights are those of a mean of ones over the count."""
    mean = f(x.mean)
    count = f(torch.ones_like(x.mean)) * x.mean.numel() / max(mean.numel(), 1)
    return Moments(mean, f(x.variance) / count, None if x.shared is None else f(x.shared))


def weighted(op: Any, args: tuple[Any, ...]) -> Moments:
    """Return the moments of a weighted sum with constant weights."""
    if op is aten.addmm:
        bias, x, weight = args[:3]
        return plus_constant(weighted(aten.matmul, (x, weight)), bias)
    if op is frozen_convolution:
        dims, x, weight, bias, *window = args + (None,) * (4 - len(args))
        constant = isinstance(weight, Tensor)
        apply: Any = lambda t, w, b=None: op(dims, t, w, b, *window)  # noqa: E731
    elif op is frozen_batch_norm:
        x, weight, bias, mean, var, eps = args
        scale = (var + eps).rsqrt() * (1.0 if weight is None else weight)
        scale = scale.reshape(-1, *[1] * (x.mean.dim() - 2))
        moments = map_moments(x, lambda t: t * scale, lambda t: t * scale.square())
        return Moments(op(x.mean, weight, bias, mean, var, eps), *moments[1:])
    else:
        x, weight, *rest = args
        bias, constant = (rest or [None])[0], isinstance(x, Moments) and isinstance(weight, Tensor)
        apply = lambda t, w, b=None: op(t, w) if b is None else op(t, w, b)  # noqa: E731
    if not constant or not isinstance(x, Moments):
        raise NotImplementedError("DASP has no probabilistic layer for computed weights")
    shared = None if x.shared is None else apply(x.shared, weight)
    return Moments(apply(x.mean, weight, bias), apply(x.variance, weight.square()), shared)


def plus_constant(x: Moments, constant: Any, sign: float = 1) -> Moments:
    """Return the moments of a sum with a constant."""
    mean = x.mean + sign * constant
    expand = lambda t: t.expand(mean.shape)  # noqa: E731
    return Moments(mean, expand(x.variance), None if x.shared is None else expand(x.shared))


def added(sign: float, a: Any, b: Any) -> Moments:
    """Return the moments of a sum or difference."""
    if not isinstance(b, Moments):
        return plus_constant(a, b, sign)
    if not isinstance(a, Moments):
        return plus_constant(map_moments(b, lambda t: sign * t, lambda t: t), a)
    return plus(a, b, sign)


def multiplied(target: Any, a: Any, b: Any) -> Moments:
    """Return the moments of a product, or of a quotient by a constant."""
    if isinstance(a, Moments) and isinstance(b, Moments):
        if a is b:
            return from_normal(*a.independent(), torch.square)
        return product(a, b)
    if isinstance(a, Moments):
        return map_moments(a, lambda t: target(t, b), lambda t: target(target(t, b), b))
    return map_moments(b, lambda t: target(t, a), lambda t: target(target(t, a), a))


def concatenate(parts: Sequence[Any], dim: int = 0) -> Moments:
    """Return the moments of concatenated values, some of which may be constants."""
    every = [p if isinstance(p, Moments) else Moments(p, torch.zeros_like(p), None) for p in parts]
    if any(p.shared is None and bool(p.variance.any()) for p in every) or all(
        p.shared is None for p in every
    ):
        pairs = [p.independent() for p in every]
        return Moments(*(torch.cat(list(t), dim) for t in zip(*pairs, strict=True)))
    filled = [
        (p.mean, p.variance, torch.zeros_like(p.mean) if p.shared is None else p.shared)
        for p in every
    ]
    return Moments(*(torch.cat(list(t), dim) for t in zip(*filled, strict=True)))


def coalitions_by_size(x: Tensor, r: Tensor, size: Tensor) -> Moments:
    """Return the moments of the inputs without and with each feature, for coalition sizes.

    Parameters
    ----------
    x, r : Tensor
        The sample and the reference, of shape (features,).
    size : Tensor
        Numbers of other features in the coalition, of shape (sizes,).

    Returns
    -------
    Moments
        Of shape (2 * features * sizes, features): without the feature, then with it.
    """
    features, others = len(x), max(len(x) - 1, 1)
    absent = 1 - torch.eye(features, dtype=x.dtype).unsqueeze(1)  # (features, 1, features)
    d = ((x - r) * absent).expand(features, len(size), features)  # of the others
    share = (size / others).reshape(1, -1, 1)
    mean = r + share * d
    # Of k of N terms drawn without replacement: k (N - k) / (N - 1) (mean(v^2) - mean(v)^2).
    spread = (size * (others - size) / max(others - 1, 1) / others).reshape(1, -1, 1)
    variance, shared = spread * d.square(), (spread / others).sqrt() * d
    present = mean + ((x - r) * (1 - absent)).expand_as(mean)
    halves = [torch.cat([a, b]).flatten(0, 1) for a, b in
              ((mean, present), (variance, variance), (shared, shared))]  # fmt: skip
    return Moments(*halves)


@torch.no_grad()
def with_dasp(
    model: nn.Module, references: Sequence[Tensor], outputs: int, *, sizes: int | None = None
) -> Callable[..., Tensor]:
    """Explain with DASP, against every reference; see :mod:`benchmarks.adapters`.

    At most `sizes` coalition sizes are used, by default all.
    """
    program = bound_program(model, list(references))
    graph = program.rewritten.output_graph
    shapes = [tuple(r.shape[1:]) for r in references]

    @torch.no_grad()
    def explain(samples: Sequence[Tensor]) -> Tensor:
        pairs = [
            [values_of(graph, x, r, shapes, sizes) for r in adapters.join(references)]
            for x in adapters.join(samples)
        ]
        return torch.stack([torch.stack(of_sample).mean(0) for of_sample in pairs])

    return explain


@torch.no_grad()
def dasp_of_pairs(
    model: nn.Module, samples: Sequence[Tensor], references: Sequence[Tensor], outputs: int
) -> Tensor:
    """Explain every sample against its own reference; return (pairs, features, outputs)."""
    graph = bound_program(model, [r[:1] for r in references]).rewritten.output_graph
    shapes = [tuple(r.shape[1:]) for r in references]
    pairs = zip(adapters.join(samples), adapters.join(references), strict=True)
    return torch.stack([values_of(graph, x, r, shapes, None) for x, r in pairs])


def values_of(
    graph: fx.GraphModule,
    x: Tensor,
    r: Tensor,
    shapes: Sequence[tuple[int, ...]],
    sizes: int | None,
) -> Tensor:
    """Return the values of one pair, of shape (features, outputs)."""
    features = len(x)
    count = min(sizes or features, features)
    size = (torch.arange(count, dtype=x.dtype) + 0.5) * features / count - 0.5
    moments = coalitions_by_size(x, r, size)
    means = [
        Propagation(graph).run(*(Moments(*t) for t in zip(*parts, strict=True))).mean
        for rows in zip(*(m.split(ROWS_AT_ONCE) for m in moments), strict=True)
        for parts in [[adapters.split(t, shapes) for t in rows]]
    ]
    without, with_feature = torch.cat(means).chunk(2)
    gains: Tensor = (with_feature - without).unflatten(0, (features, -1))
    return gains.mean(1)
