"""Models that check their input or store a statistic, and those that draw numbers beside it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributions, nn

from tests.networks.reports.report import Report

report = partial(Report, family="checks")


class Checked(nn.Module):
    """Two layers, with a function called on what is between them."""

    def __init__(self, check: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(10, 6), nn.Linear(6, 3)
        self.check = check

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(x))
        self.check(self, h)
        return self.out(h)


def finite(model: nn.Module, h: Tensor) -> None:
    assert torch.isfinite(h).all(), "not finite"


def not_a_number(model: nn.Module, h: Tensor) -> None:
    if torch.isnan(h).any() or torch.isinf(h).any():
        raise ValueError("NaN or infinity")


def warned(model: nn.Module, h: Tensor) -> None:
    if h.abs().max() > 1:
        warnings.warn("saturated", stacklevel=2)


def logged(model: nn.Module, h: Tensor) -> None:
    logging.getLogger("model").debug("mean %.3f", h.mean().item())


def stored(model: nn.Module, h: Tensor) -> None:
    model.statistic = float(h.mean())
    model.activations = h.detach().numpy()


def in_range(model: nn.Module, h: Tensor) -> None:
    if h.abs().max().item() > 1e3:
        raise OverflowError("too large")


class Distribution(nn.Module):
    """A distribution with validated parameters, and what is explained of it."""

    def __init__(self, explained: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.location, self.log_scale = nn.Linear(10, 3), nn.Linear(10, 3)
        self.explained = explained

    def forward(self, x: Tensor) -> Tensor:
        return self.explained(self.location(x), self.log_scale(x).tanh())


def normal(location: Tensor, log_scale: Tensor) -> Tensor:
    return distributions.Normal(location, log_scale.exp()).log_prob(torch.ones(3))


def policy(location: Tensor, log_scale: Tensor) -> Tensor:
    return distributions.Categorical(logits=location).probs


def coins(location: Tensor, log_scale: Tensor) -> Tensor:
    return distributions.Bernoulli(probs=location.sigmoid()).entropy()


def independent(location: Tensor, log_scale: Tensor) -> Tensor:
    normals = distributions.Independent(distributions.Normal(location, log_scale.exp()), 1)
    return normals.log_prob(torch.ones(3))[:, None]


def mixture(location: Tensor, log_scale: Tensor) -> Tensor:
    weights = distributions.Categorical(logits=log_scale)
    parts = distributions.Normal(location, log_scale.exp())
    return distributions.MixtureSameFamily(weights, parts).log_prob(torch.ones(1))[:, None]


def divergence(location: Tensor, log_scale: Tensor) -> Tensor:
    prior = distributions.Normal(0.0, 1.0)
    return distributions.kl_divergence(distributions.Normal(location, log_scale.exp()), prior)


def counts(location: Tensor, log_scale: Tensor) -> Tensor:
    return distributions.NegativeBinomial(log_scale.exp(), logits=location).mean


class VariationalAutoencoder(nn.Module):
    """Returns the mean beside what is decoded from a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(10, 6), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_variance = torch.tanh(self.encoder(x)).chunk(2, 1)
        posterior = distributions.Normal(mean, (log_variance / 2).exp())
        decoded = self.decoder(posterior.rsample())
        divergence = distributions.kl_divergence(posterior, distributions.Normal(0.0, 1.0))
        return {"decoded": decoded, "mean": mean, "divergence": divergence}


class ActorCritic(nn.Module):
    """Returns a drawn action, its logits and the value of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(10, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.relu(self.body(x))
        choices = distributions.Categorical(logits=self.actor(h))
        action = choices.sample()
        return action, choices.log_prob(action), choices.logits, self.critic(h)


class BesideTheOutput(nn.Module):
    """Returns the logits and something that has no gradient."""

    def __init__(self, other: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 6), nn.GELU(), nn.Linear(6, 3))
        self.other = other

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        logits = self.layers(x)
        return logits, self.other(logits)


REPORTS = [
    *(
        report(f"check_{check.__name__}", architecture=partial(Checked, check), source=source)
        for check, source in (
            (finite, "assertions"),
            (not_a_number, "checks for NaN"),
            (warned, "warnings"),
            (logged, "logs"),
            (stored, "statistics for a dashboard"),
            (in_range, "checks of a range"),
        )
    ),
    *(
        report(
            f"distribution_{explained.__name__}",
            architecture=partial(Distribution, explained),
            source=source,
        )
        for explained, source in (
            (normal, "probabilistic regression"),
            (policy, "policies"),
            (coins, "policies"),
            (independent, "policies"),
            (mixture, "mixture density networks"),
            (divergence, "variational autoencoders"),
            (counts, "scvi-tools, DeepAR"),
        )
    ),
    report("vae_mean", architecture=VariationalAutoencoder, options={"output": "mean"},
           source="variational autoencoders"),
    report("vae_divergence", architecture=VariationalAutoencoder, options={"output": "divergence"},
           source="variational autoencoders"),
    report("policy_logits", architecture=ActorCritic, options={"output": 2}, source="actor-critic"),
    report("policy_value", architecture=ActorCritic, options={"output": 3}, source="actor-critic"),
    *(
        report(
            f"beside_{name}",
            architecture=partial(BesideTheOutput, other),
            options={"output": 0},
            source="results for logs",
        )
        for name, other in (
            ("drawn_labels", lambda y: torch.multinomial(y.softmax(1), 1)),
            ("labels", lambda y: y.argmax(1).tolist()),
            ("confident_rows", lambda y: y[y.amax(1) > 0]),
            ("choice", lambda y: y if y.sum() > 0 else -y),
            ("array", lambda y: y.detach().numpy()),
        )
    ),
]  # fmt: skip
