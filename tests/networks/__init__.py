"""Small networks written the many ways people write them, ten input features each.

``NETWORKS`` maps the name of every network to its :class:`Network`.

Examples
--------
>>> from tests.networks import NETWORKS
>>> network = NETWORKS["gelu_by_erf"]
>>> network.build()(*network.inputs(4)).shape
torch.Size([4, 3])
"""

from tests.networks import (
    activations,
    attention,
    choices,
    gelu,
    generic,
    genomics,
    images,
    interacting,
    layouts,
    logic,
    normalisation,
    pooling,
    products,
    recurrent,
    series,
    softmax,
    tables,
)
from tests.networks.network import Network

NETWORKS: dict[str, Network] = {
    network.name: network
    for family in (
        activations,
        gelu,
        products,
        normalisation,
        softmax,
        pooling,
        attention,
        recurrent,
        logic,
        choices,
        layouts,
        images,
        generic,
        series,
        tables,
        genomics,
        interacting,
    )
    for network in family.NETWORKS
}

__all__ = ["NETWORKS", "Network"]
