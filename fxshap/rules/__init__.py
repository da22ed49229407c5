"""Rules: how each operation passes a cotangent back between a reference and a sample.

Importing this package registers the rules of PyTorch's operators; each module holds one family of
them. The makers that register rules are public, so an operator of your own gets a rule in one line.

- :func:`elementwise`: a function of every element by itself; the multiplier is its secant.
- :func:`bilinear`: a product of two arguments; the derivative at the midpoint.
- :func:`linear`: linear (affine) in its arguments together; autograd's derivative.
- :func:`decomposition`: other operations that take the operator's place.
- :func:`rule`: a function of two points and a cotangent, for an operation with its own formula.

Declare a rule before the model is captured. A later declaration for the same operator wins.

Public besides these are :class:`Operation` and :func:`vjp`, which a rule uses, and the registry:
``RULES`` maps operators to their :class:`Rule`, ``DECOMPOSITIONS`` maps overloads to the
functions that take their place, and :func:`find_rule` looks up the rule of an overload.

Examples
--------
An activation that is one kernel to PyTorch, x + sin(x)^2 (Ziyin et al. 2020, eq. 3):

>>> import shap, torch, fxshap
>>> @torch.library.custom_op("example::snake", mutates_args=())
... def snake(x: torch.Tensor) -> torch.Tensor:
...     return x + x.sin() ** 2
>>> @snake.register_fake
... def _(x):
...     return torch.empty_like(x)
>>> def backward(ctx, grad):
...     return grad * (1 + torch.sin(2 * ctx.saved_tensors[0]))
>>> def save(ctx, inputs, output):
...     ctx.save_for_backward(*inputs)
>>> snake.register_autograd(backward, setup_context=save)

The rule, and a check of it:

>>> fxshap.rules.elementwise(snake)
>>> fxshap.testing.check_rule(snake, [fxshap.testing.Varying((5,))])

From then on models that call it can be explained:

>>> class Snake(torch.nn.Module):
...     def forward(self, x):
...         return snake(x)
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), Snake(), torch.nn.Linear(8, 2))
>>> explainable = fxshap.make_explainable(model)
>>> explainer = shap.DeepExplainer(explainable, torch.randn(10, 4))
>>> explainer.shap_values(torch.randn(3, 4)).shape
(3, 4, 2)
"""

# Importing a module registers its rules.
from fxshap.rules import (  # noqa: F401
    affine,
    decompositions,
    gelu,
    logic,
    matrices,
    maximum,
    multilinear,
    multivariate,
    normalization,
    piecewise,
    pooling,
    products,
    ranking,
    recurrent,
    recurrent_steps,
    smoothed_activations,
    smoothed_logsumexp,
    smoothed_maxima,
    softmax,
    sorting,
    univariate,
)
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import (
    DECOMPOSITIONS,
    RULES,
    Rule,
    decomposition,
    find_rule,
    linear,
    rule,
)
from fxshap.rules.elementwise import elementwise
from fxshap.rules.products import bilinear

__all__ = [
    "DECOMPOSITIONS",
    "RULES",
    "Operation",
    "Rule",
    "bilinear",
    "decomposition",
    "elementwise",
    "find_rule",
    "linear",
    "rule",
    "vjp",
]
