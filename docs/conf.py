"""The Sphinx configuration of the documentation: ``make docs``."""

import importlib.util
import json
import os
import re
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks of the examples are small
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from inventories import write_inventories  # noqa: E402
from sphinx_gallery.scrapers import matplotlib_scraper  # noqa: E402
from tables import fit_cells  # noqa: E402

from fxshap._version import __version__  # noqa: E402

project = "fxshap"
author = "the fxshap authors"
copyright = author  # noqa: A001
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "examples"]


def optional(module: str) -> bool:
    """Return True if the package has this module, which a page of the reference describes."""
    return importlib.util.find_spec(f"fxshap.{module}") is not None


exclude_patterns += [
    f"api/{page.name}"
    for page in Path(__file__).parent.glob("api/*.md")
    if page.stem not in ("index", "fxshap") and not optional(page.stem)
]

# --- Markdown and docstrings ---------------------------------------------------------------------

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
smartquotes_action = "qe"  # two dashes stay two, as in options
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = True
napoleon_type_aliases = {
    "Tensor": "torch.Tensor",
    "nn.Module": "torch.nn.Module",
    "fx.Graph": "torch.fx.Graph",
    "fx.GraphModule": "torch.fx.GraphModule",
    "fx.Node": "torch.fx.Node",
    "Dataset": "torch.utils.data.Dataset",
    "DataLoader": "torch.utils.data.DataLoader",
    "ndarray": "numpy.ndarray",
    "DataFrame": "pandas.DataFrame",
    "Path": "pathlib.Path",
    "sequence": "collections.abc.Sequence",
    "mapping": "collections.abc.Mapping",
    "callable": "collections.abc.Callable",
    "iterable": "collections.abc.Iterable",
    "iterator": "collections.abc.Iterator",
    "Refinement": "fxshap.Refinement",
    "ExplainableModule": "fxshap.ExplainableModule",
    "Report": "fxshap.Report",
    "Verification": "fxshap.Verification",
    "Summary": "fxshap.datasets.Summary",
    "ReportEntry": "fxshap.report.report.ReportEntry",
    "SampleCheck": "fxshap.verification.result.SampleCheck",
    "Leak": "fxshap.verification.leaks.Leak",
    "Rule": "fxshap.rules.Rule",
    "Operation": "fxshap.rules.Operation",
    "RuleFn": "fxshap.rules.core.registry.RuleFn",
    "ExplainedBatch": "fxshap.datasets.batch.ExplainedBatch",
    "RefusedRow": "fxshap.datasets.summary.RefusedRow",
    "Sample": "fxshap.datasets.summary.Sample",
}
# Members of tuples.
for word in ("Tensor", "ndarray", "nn.Module", "str", "list", "None"):
    target = napoleon_type_aliases.get(word, word)
    napoleon_type_aliases[f"({word}"] = f":py:obj:`({word} <{target}>`"
    napoleon_type_aliases[f"{word})"] = f":py:obj:`{word}) <{target}>`"
#: Words in the types of parameters, and names of packages whose pages have no inventory here.
nitpicky = True
nitpick_ignore_regex = [
    ("py:(class|obj)", r"arrays?|these|pair|paths?|operators?|of|per|of one such .*|str to str"),
    ("py:(class|obj)", r"(\w+\.)*(ray\.data\.Dataset|pyarrow\.Table|Table|TreeSpec|OpOverload\w*)"),
]
intersphinx_mapping = write_inventories(Path(__file__).parent / "_build" / "inventories")
autodoc_member_order = "groupwise"
autodoc_typehints = "none"  # the docstrings have them
add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# --- Guides: they run while the pages are built, and an error fails the build --------------------


def whole_figures(*block):
    """Save the figures of an example with all labels, which SHAP writes outside of the axes."""
    return matplotlib_scraper(*block, bbox_inches="tight")


#: What every notebook begins with.
FIRST_CELL = """\
# Start this notebook in a clone of fxshap, or write the path of one in place of the dot.
try:
    import fxshap
except ImportError:
    %pip install -q ".[examples]"
"""

suppress_warnings = ["config.cache"]  # a function in the settings

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "guides/gallery",
    "backreferences_dir": "guides/gallery/backreferences",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "first_notebook_cell": FIRST_CELL,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 10**6,
    "write_computation_times": False,
    "image_scrapers": (whole_figures,),
    "thumbnail_size": (400, 280),
}
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"shap\.")
warnings.filterwarnings("ignore", category=PendingDeprecationWarning, module=r"shap\.")

# --- HTML ----------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "fxshap"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["fxshap.css"]
html_search_scorer = str(Path(__file__).parent / "scorer.js")
html_sidebars = {"start": [], "**": ["sidebar-nav-bs"]}
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "show_prev_next": True,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    # The tables of these pages need the width.
    "secondary_sidebar_items": {"**": ["page-toc"], "coverage": [], "fidelity": [], "speed": []},
    "navbar_end": ["theme-switcher"],
    "logo": {"text": "fxshap"},
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}


def list_present(app, docname, source):
    """Remove the entries of a toctree that have a question mark and no page.

    Benchmarks write some pages, so a checkout may lack them.
    """
    folder = (Path(app.srcdir) / docname).parent

    def present(entry):
        return f"{entry[1]}\n" if (folder / f"{entry[1]}.md").exists() else ""

    source[0] = re.sub(r"^([\w./-]+)\?\n", present, source[0], flags=re.MULTILINE)


def keep_formulas(app, what, name, obj, options, lines):
    """Keep the line breaks of the indented formulas at the top of a file of rules."""
    if what != "module" or not name.startswith("fxshap.rules."):
        return
    for at in range(len(lines) - 1, 0, -1):
        if lines[at].startswith("    ") and not lines[at - 1]:
            lines[at:at] = ["::", ""]


def keep_examples(app, context, lines):
    """Show the commands in a help text as code."""
    for at, line in enumerate(lines):
        if line.startswith("|   "):
            lines[at] = f"|   ``{line.removeprefix('|').strip()}``"


#: Classes that only functions of the library create; their constructors are not public.
MADE_BY_THE_LIBRARY = {
    "fxshap.ExplainableModule",
    "fxshap.Report",
    "fxshap.datasets.batch.ExplainedBatch",
    "fxshap.datasets.summary.RefusedRow",
    "fxshap.datasets.summary.Sample",
    "fxshap.rules.core.registry.RuleFn",
    "fxshap.Verification",
    "fxshap.datasets.Summary",
    "fxshap.report.report.ReportEntry",
    "fxshap.verification.leaks.Leak",
    "fxshap.verification.result.SampleCheck",
}
#: Public names of base classes, by the private names.
BASES = {
    "fxshap.integrations.isolation.ProbedModule": "torch.nn.Module",
    "shap.explainers._explainer.Explainer": "shap.Explainer",
}


def hide_constructors(app, what, name, obj, options, signature, returns):
    """Show no arguments of classes that users do not create."""
    return ("", returns) if name in MADE_BY_THE_LIBRARY else None


def name_bases(app, name, obj, options, bases):
    """Name a base class as the documentation of its package does."""
    for at, base in enumerate(bases):
        public = BASES.get(f"{base.__module__}.{base.__qualname__}")
        if public:
            bases[at] = f":py:class:`{public}`"


def name_pages(app):
    """Replace links to pages of this documentation, which a notebook lacks, by their texts."""
    for path in (Path(app.srcdir) / "guides" / "gallery").glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                text = "".join(cell["source"])
                cell["source"] = [re.sub(r":doc:`/?([^<`]*?)\s*(?:<[^>]*>)?`", r"*\1*", text)]
        path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


def setup(app):
    app.connect("builder-inited", name_pages, priority=900)  # after the gallery has written them
    app.connect("autodoc-process-signature", hide_constructors)
    app.connect("autodoc-process-bases", name_bases)
    app.connect("autodoc-process-docstring", keep_formulas)
    app.connect("source-read", list_present)
    app.connect("doctree-read", fit_cells)
    app.connect("sphinx-click-process-description", keep_examples)
