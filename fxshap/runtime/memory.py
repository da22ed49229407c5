"""How large the tensors of a computation are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest new tensor that operations return.

    Attributes
    ----------
    size : int
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and measure its results, unless they are views."""
        results = function(*args, **(kwargs or {}))
        if not any(result.alias_info for result in function._schema.returns):
            tensors = [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
            self.size = max(self.size, *(x.nbytes for x in tensors), 0)
        return results
