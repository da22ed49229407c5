"""Inventories for intersphinx of the names in docstrings, so that no build needs a network."""

import zlib
from pathlib import Path

#: For each project: its address, and the pages of its names by role of the Python domain.
PROJECTS = {
    "python": (
        "https://docs.python.org/3/",
        {
            "class": {
                "int": "library/functions.html#int",
                "float": "library/functions.html#float",
                "bool": "library/functions.html#bool",
                "str": "library/stdtypes.html#str",
                "dict": "library/stdtypes.html#dict",
                "list": "library/stdtypes.html#list",
                "tuple": "library/stdtypes.html#tuple",
                "set": "library/stdtypes.html#set",
                "range": "library/stdtypes.html#range",
                "pathlib.Path": "library/pathlib.html#pathlib.Path",
                "collections.abc.Sequence": "library/collections.abc.html#collections.abc.Sequence",
                "collections.abc.Mapping": "library/collections.abc.html#collections.abc.Mapping",
                "collections.abc.Callable": "library/collections.abc.html#collections.abc.Callable",
                "collections.abc.Iterable": "library/collections.abc.html#collections.abc.Iterable",
                "collections.abc.Iterator": "library/collections.abc.html#collections.abc.Iterator",
            },
            "exception": {
                f"{name}": f"library/exceptions.html#{name}"
                for name in (
                    *("Exception", "AssertionError", "ImportError", "RuntimeError", "TypeError"),
                    *("ValueError", "FileExistsError", "FileNotFoundError", "KeyError"),
                    "AttributeError",
                )
            },
            "data": {"None": "library/constants.html#None"},
        },
    ),
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        {
            "class": {
                "torch.Tensor": "tensors.html#torch.Tensor",
                "torch.dtype": "tensor_attributes.html#torch.dtype",
                "torch.nn.Module": "generated/torch.nn.Module.html#torch.nn.Module",
                "torch.fx.Graph": "fx.html#torch.fx.Graph",
                "torch.fx.GraphModule": "fx.html#torch.fx.GraphModule",
                "torch.fx.Node": "fx.html#torch.fx.Node",
                "torch.utils.data.Dataset": "data.html#torch.utils.data.Dataset",
                "torch.utils.data.DataLoader": "data.html#torch.utils.data.DataLoader",
            },
        },
    ),
    "numpy": (
        "https://numpy.org/doc/stable/",
        {"class": {"numpy.ndarray": "reference/generated/numpy.ndarray.html#numpy.ndarray"}},
    ),
    "pandas": (
        "https://pandas.pydata.org/docs/",
        {"class": {"pandas.DataFrame": "reference/api/pandas.DataFrame.html#pandas.DataFrame"}},
    ),
    "shap": (
        "https://shap.readthedocs.io/en/latest/",
        {
            "class": {
                name: f"generated/{name}.html#{name}"
                for name in ("shap.DeepExplainer", "shap.Explainer", "shap.Explanation")
            },
        },
    ),
}


def write_inventories(folder: Path) -> dict[str, tuple[str, str]]:
    """Write an ``objects.inv`` for every project; return the mapping for intersphinx."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for project, (address, roles) in PROJECTS.items():
        lines = "".join(
            f"{name} py:{role} 1 {page} -\n"
            for role, names in roles.items()
            for name, page in names.items()
        )
        head = (
            f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
            "# The remainder of this file is compressed using zlib.\n"
        )
        path = folder / f"{project}.inv"
        path.write_bytes(head.encode() + zlib.compress(lines.encode()))
        mapping[project] = (address, str(path))
    return mapping
