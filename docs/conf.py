"""The Sphinx configuration of the documentation: ``make docs``."""

import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks of the examples are small
sys.path.insert(0, str(Path(__file__).parent.parent))

from sphinx_gallery.scrapers import matplotlib_scraper  # noqa: E402

from fxshap._version import __version__  # noqa: E402

project = "fxshap"
author = "the fxshap authors"
copyright = author  # noqa: A001
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
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
napoleon_numpy_docstring = True
napoleon_google_docstring = False
napoleon_use_rtype = False
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
html_static_path = ["_static"]
html_css_files = ["fxshap.css"]
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
    """Show the commands in a help text as code, so that two dashes are not joined."""
    for at, line in enumerate(lines):
        if line.startswith("|   fxshap "):
            lines[at] = f"|   ``{line.removeprefix('|').strip()}``"


def setup(app):
    app.connect("autodoc-process-docstring", keep_formulas)
    app.connect("source-read", list_present)
    app.connect("sphinx-click-process-description", keep_examples)
