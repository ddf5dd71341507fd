"""How Sphinx builds the site: ``make docs``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import kfc_fx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from torch_inventory import write_inventory  # noqa: E402 - from the folder above

project = "kfc_fx"
author = "the kfc_fx contributors"
version = release = kfc_fx.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "measured",
    "properties",
]
exclude_patterns = ["_build", "_ext", "gallery/*.ipynb", "**/sg_execution_times.rst"]
nitpicky = False
html_math_renderer = "mathml"

# -- pages in Markdown -----------------------------------------------------------------------

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # the settings of the gallery hold functions

# -- reference -------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the text of an argument says its type where it matters
autodoc_mock_imports = ["lightning"]  # for one callback, in a build without it
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# torch's own list is not at hand where a build has no network, so that the names which the pages
# link to stand in a file here.
intersphinx_mapping = {
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        write_inventory(HERE / "torch_names.txt", HERE / "_build" / "torch.inv"),
    )
}

# -- gallery ---------------------------------------------------------------------------------

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peft asks for nothing
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(autoencoder|classification|gpt|laplace|lora)\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "capture_repr": (),
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
}

# -- HTML ------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"kfc_fx {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
