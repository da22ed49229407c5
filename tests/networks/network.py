"""A named small network: how to build it, what it takes, what is known about it."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxshap._requirements import OLDEST

Shape = tuple[int, ...]

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.RMSNorm,
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Network:
    """A small network with ten input features, built the same way every time.

    Parameters
    ----------
    name : str
        A unique name, also the seed of the weights.
    family : str
        The group of networks it belongs to.
    architecture : callable
        Makes the network with PyTorch's default initialisation.
    shapes : tuple of tuple of int
        The shape of one sample of each input; ten elements in all.
    outputs : int
        The number of output columns.
    shap_exact : bool
        Whether stock ``shap.DeepExplainer`` applies the right rule to every operation.
    gain : float
        What the default weight matrices are multiplied by; the default initialisation by itself
        leaves most networks nearly linear.
    oldest_torch : tuple of int
        The oldest release of PyTorch that was seen to export it.
    """

    name: str
    family: str
    architecture: Callable[[], nn.Module]
    shapes: tuple[Shape, ...] = ((10,),)
    outputs: int = 3
    shap_exact: bool = False
    gain: float = 1.7
    oldest_torch: tuple[int, int] = OLDEST["torch"]

    def build(self) -> nn.Module:
        """Build the network.

        Returns
        -------
        nn.Module
            A new float32 module in evaluation mode, with the same weights every time. The
            global random state is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.architecture()
            _strengthen(model, self.gain)
            _calibrate_batch_norm(model, self.shapes)
        return model.eval()

    def inputs(
        self, count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Draw standard normal samples.

        Parameters
        ----------
        count : int
            The number of samples.
        seed : int
            The seed of the draw.
        dtype : torch.dtype
            The floating-point type of the samples.

        Returns
        -------
        tuple of Tensor
            One tensor for each input, its first dimension the samples.
        """
        generator = torch.Generator().manual_seed(seed)
        return tuple(
            torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in self.shapes
        )

    @property
    def features(self) -> int:
        """The number of input elements of one sample, over all inputs."""
        return sum(math.prod(shape) for shape in self.shapes)


def _strengthen(model: nn.Module, gain: float) -> None:
    """Scale the weight matrices and draw the affine parameters of the normalisations."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
        for module in model.modules():
            if isinstance(module, _NORMS) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(std=0.3)


def _calibrate_batch_norm(model: nn.Module, shapes: tuple[Shape, ...]) -> None:
    """Fill the running statistics of batch norms with those of random inputs."""
    if not any(isinstance(module, _BATCH_NORMS) for module in model.modules()):
        return
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(*(torch.randn(64, *shape) for shape in shapes))
