"""A network and its inputs as dataclasses, whose ``repr`` is code that builds them again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.property.blocks import BLOCKS, LAYOUTS, WIDTH

Shape = tuple[int, ...]

# --- networks -------------------------------------------------------------------------------------

#: How the result y of a block is combined with its input h.
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "replaced": lambda h, y: y,
    "added": lambda h, y: h + y,
    "added in place": lambda h, y: y.clone().add_(h),
    "halved in place": lambda h, y: (h + y).mul_(0.5),
    "gating": lambda h, y: h * y.sigmoid(),
    "multiplied": lambda h, y: h * y,
    "larger": lambda h, y: torch.maximum(h, y),
    "where positive": lambda h, y: torch.where(h > 0, y, h),
    "interleaved": lambda h, y: torch.stack([h, y], 2).flatten(1)[:, ::2],
}


@dataclass(frozen=True)
class Step:
    """One block of a network.

    Attributes
    ----------
    block : str
        Its name in ``BLOCKS``.
    of : tuple of int
        Its arguments, as earlier values counted backwards from the latest.
    layout : str
        The layout it runs in, a name in ``LAYOUTS``.
    join : str
        How its result is combined with its first argument, a name in ``JOINS``.
    times : int
        How often the block is applied, each time to its previous result.
    mixed : bool
        Whether a linear layer precedes it.
    options : dict
        The options of the block.
    """

    block: str
    of: tuple[int, ...] = (0,)
    layout: str = "flat"
    join: str = "replaced"
    times: int = 1
    mixed: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """A network as data.

    Attributes
    ----------
    steps : tuple of Step
        Each adds a value that later steps may take.
    inputs : tuple of tuple of int
        The shape of one row of every input.
    outputs : int
        The number of outputs.
    head : str
        ``"linear"``, or ``"raw"`` for the first features of the latest value.
    seed : int
        The seed of the weights.
    """

    steps: tuple[Step, ...] = ()
    inputs: tuple[Shape, ...] = ((WIDTH,),)
    outputs: int = 1
    head: str = "linear"
    seed: int = 0

    @property
    def fixes_rows(self) -> bool:
        """Whether a capture holds for one number of rows only."""
        return any(BLOCKS[step.block].fixes_rows for step in self.steps)

    def build(self) -> nn.Module:
        """Build the network in float64 and evaluation mode, without changing the random state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Built(self).double().eval()


class Stage(nn.Module):
    """The module of a step, with a linear layer if the block does not return 12 features."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.mix = nn.Linear(WIDTH, WIDTH) if step.mixed else nn.Identity()
        self.block = BLOCKS[step.block].make(**step.options)
        self.double()
        self.enter, self.leave = LAYOUTS[step.layout]
        self.fit: nn.Module = nn.Identity()
        with torch.no_grad():
            width = self.run([torch.randn(2, WIDTH, dtype=torch.float64)] * len(step.of)).shape[1]
        if width != WIDTH:
            self.fit = nn.Linear(width, WIDTH)

    def run(self, values: list[Tensor]) -> Tensor:
        y = self.leave(self.block(*map(self.enter, values)))
        return self.fit(y.flatten(1))

    def forward(self, *values: Tensor) -> Tensor:
        h, *others = values
        y = self.run([self.mix(h), *others])
        for _ in range(self.step.times - 1):
            y = self.run([y, *others])
        return JOINS[self.step.join](h, y)


class Built(nn.Module):
    """The module of a network."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.enter = nn.ModuleList(
            nn.Identity() if math.prod(shape) == WIDTH else nn.Linear(math.prod(shape), WIDTH)
            for shape in network.inputs
        )
        self.stages = nn.ModuleList(Stage(step) for step in network.steps)
        self.head = nn.Linear(WIDTH, network.outputs) if network.head == "linear" else None

    def forward(self, *inputs: Tensor) -> Tensor:
        values = [enter(x.flatten(1)) for enter, x in zip(self.enter, inputs, strict=True)]
        for stage, step in zip(self.stages, self.network.steps, strict=True):
            values.append(stage(*[values[-1 - place % len(values)] for place in step.of]))
        last = values[-1]
        return last[:, : self.network.outputs] * 1.0 if self.head is None else self.head(last)


# --- data -----------------------------------------------------------------------------------------


def near(r: Tensor, noise: Tensor) -> Tensor:
    """Return a value a few units in the last place from r."""
    return r * (1 + 1e-15 * noise) + 1e-15 * noise


def one_feature(r: Tensor, noise: Tensor) -> Tensor:
    """Return r with another first feature."""
    x = r.flatten(1).clone()
    x[:, 0] = noise.flatten(1)[:, 0]
    return x.reshape(r.shape)


def constant(r: Tensor, noise: Tensor) -> Tensor:
    """Return rows of one number each."""
    return noise.flatten(1)[:, :1].expand(-1, noise[0].numel()).reshape(r.shape)


#: Samples, as functions of as many rows of the references and noise of the same shape.
SAMPLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "random": lambda r, noise: noise,
    "equal": lambda r, noise: r,
    "near": near,
    "nearer than SHAP's bound": lambda r, noise: r + 1e-7 * noise,
    "close": lambda r, noise: r + 1e-3 * noise,
    "opposite": lambda r, noise: -r,
    "zeros": lambda r, noise: torch.zeros_like(r),
    "halves": lambda r, noise: (noise * 2).round() / 2,
    "one feature": one_feature,
    "constant": constant,
}

REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda noise: noise,
    "zeros": torch.zeros_like,
    "halves": lambda noise: (noise * 2).round() / 2,
    "constant": lambda noise: constant(noise, noise),
    "alike": lambda noise: noise[:1].expand_as(noise).clone(),
}


@dataclass(frozen=True)
class Data:
    """Samples and references as data.

    Attributes
    ----------
    sample, reference : str
        Their kinds, names in ``SAMPLES`` and in ``REFERENCES``.
    rows : int
        The number of references.
    scale : float
        The factor of all values.
    seed : int
        The seed of the noise.
    """

    sample: str = "random"
    reference: str = "random"
    rows: int = 2
    scale: float = 1.0
    seed: int = 0

    def draw(self, shapes: tuple[Shape, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Return two rows of samples, and the references, with one tensor for each input."""
        generator = torch.Generator().manual_seed(self.seed)
        samples, references = [], []
        for shape in shapes:
            noise = torch.randn(2, max(self.rows, 2), *shape, generator=generator).double()
            r = REFERENCES[self.reference](noise[0])
            samples.append(SAMPLES[self.sample](r[:2], noise[1, :2]) * self.scale)
            references.append(r[: self.rows] * self.scale)
        return samples, references
