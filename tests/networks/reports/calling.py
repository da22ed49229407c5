"""Models that take their inputs in other ways than one tensor after the other."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.networks.reports.report import Report

report = partial(Report, family="calling", shapes=((6,), (4,)), source="ways to call a model")


class TwoInputs(nn.Module):
    """Two inputs that gate each other; subclasses take them in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Take (batch, 6) and (batch, 4)."""
        return self.head(torch.tanh(self.first(x)) * torch.sigmoid(self.second(y)))


class TakesDict(TwoInputs):
    """As data loaders of dictionaries give their batches."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Take a dict with ``numbers`` and ``dates``."""
        return self.join(batch["numbers"], batch["dates"])


class TakesNestedDict(TwoInputs):
    """A dict of dicts, with a scale that is not explained."""

    def forward(self, batch, scale=1.0):
        """Take a dict with an entry ``inputs``."""
        inputs = batch["inputs"]
        return self.join(inputs["numbers"], inputs["dates"]) * scale


class TakesList(TwoInputs):
    """As Keras models are called."""

    def forward(self, xs):
        """Take a list of two tensors."""
        return self.join(xs[0], xs[1])


class TakesTuple(TwoInputs):
    """A tuple that is annotated, and an option."""

    def forward(self, xs: tuple[Tensor, Tensor], sharp: bool = False) -> Tensor:
        """Take a tuple of two tensors."""
        x, y = xs
        return self.join(x, y).square() if sharp else self.join(x, y)


class TakesKeywords(TwoInputs):
    """Only ``**features``."""

    def forward(self, **features: Tensor) -> Tensor:
        """Take ``numbers`` and ``dates``."""
        return self.join(features["numbers"], features["dates"])


class TakesKeywordOnly(TwoInputs):
    """Parameters after a star."""

    def forward(self, *, numbers: Tensor, dates: Tensor, sharp: bool = False) -> Tensor:
        """Take ``numbers`` and ``dates``."""
        y = self.join(numbers, dates)
        return y.square() if sharp else y


class TakesMany(TwoInputs):
    """Any number of inputs."""

    def forward(self, *inputs: Tensor, scale: Tensor | None = None) -> Tensor:
        """Take two tensors."""
        y = self.join(*inputs)
        return y if scale is None else y / scale


class TakesObject(TwoInputs):
    """Attributes of an object, as PyTorch Geometric's ``Data``."""

    def forward(self, data):
        """Take an object with ``numbers`` and ``dates``."""
        return self.join(data.numbers, data.dates)


class TakesIds(TwoInputs):
    """A category in the dict, besides what is explained."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(4, 3)

    def forward(self, batch):
        """Take a dict with ``numbers``, ``dates`` and ``kind``."""
        return self.join(batch["numbers"], batch["dates"]) * self.kinds(batch["kind"])


class Standardized(nn.Module):
    """Statistics of the features, a temperature of shape (1,), and weights of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, x, mean, std, temperature):
        """Take (batch, 10), (10,), (10,) and (1,)."""
        return self.head(torch.relu(self.hidden((x - mean) / std))) / temperature


class MaskedAttention(nn.Module):
    """Attention under a mask of shape (heads, steps, steps) that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(2, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Take (batch, 5, 2) and (2, 5, 5)."""
        q, k, v = self.project(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


def statistics() -> dict[str, Tensor]:
    """Statistics of ten features."""
    return {
        "mean": torch.linspace(-1, 1, 10),
        "std": torch.linspace(0.5, 2, 10),
        "temperature": torch.tensor([0.7]),
    }


def causal_masks() -> Tensor:
    """A causal mask, and one that is open."""
    return torch.stack([torch.ones(5, 5).tril(), torch.ones(5, 5)]).bool()


NAMES = {"input_names": ("numbers", "dates")}

REPORTS = [
    report("takes_dict", architecture=TakesDict, options=NAMES),
    report(
        "takes_nested_dict",
        architecture=TakesNestedDict,
        options={"input_names": ("batch.inputs.numbers", "batch.inputs.dates")},
        bound={"scale": torch.tensor(0.3)},
    ),
    report("takes_list", architecture=TakesList),
    report("takes_tuple", architecture=TakesTuple, bound={"sharp": True}),
    report("takes_keywords", architecture=TakesKeywords, options=NAMES),
    report("takes_keyword_only", architecture=TakesKeywordOnly, bound={"sharp": True}),
    report("takes_many", architecture=TakesMany, bound={"scale": torch.tensor([0.5, 2.0, 3.0])}),
    report(
        "takes_object",
        architecture=TakesObject,
        options={"input_names": ("data.numbers", "data.dates")},
        bound={"data": SimpleNamespace(numbers=None, dates=None)},
    ),
    report(
        "takes_ids",
        architecture=TakesIds,
        options=NAMES,
        bound={"batch": {"kind": torch.tensor([2])}},
    ),
    report("standardized", architecture=Standardized, shapes=((10,),), bound=statistics()),
    report(
        "shared_mask",
        architecture=MaskedAttention,
        shapes=((5, 2),),
        bound={"mask": causal_masks()},
    ),
]
