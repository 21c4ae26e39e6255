"""Sphinx's settings. `make docs` builds the site into `docs/_build/html`."""

import ast
import inspect
import os
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

# Of the cells that are executed, too.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYTHONPATH"] = str(HERE.parent)

import tables  # noqa: E402

import lowrank_optax  # noqa: E402

project = "lowrank_optax"
author = "the lowrank_optax authors"
copyright = author
version = release = lowrank_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# Quotes stand for code; the first of a line would be turned round.
smartquotes = False
exclude_patterns = ["_build", "_generated"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
# Pages are executed at each build; a committed notebook, which has its outputs, is not.
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds a cell, on a machine that is busy with others
nb_merge_streams = True
nb_output_stderr = "show"

default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# As a list of names; Sphinx takes the first of two names on a line for a type.
napoleon_custom_sections = [("Attributes", "params_style")]
maximum_signature_line_length = 60
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

nitpicky = True
# No inventory is fetched, so that the site is built without a network: what belongs to
# others, and what stands for a type, stays text.
_OTHERS = "jax jaxlib jaxtyping np numpy optax nn nnx flax typing contextlib".split()
_TYPES = """
    Any ArrayLike DTypeLike Array Bool Float Int Key Step Static Callable Mapping
    Sequence Iterable Method Path NamedTuple NamedSharding Matrices matrix.Matrices Side
    matrix.Side Mask Per Tier Fields Lying Table Row MemoryRow Observer StagedRule
    Split Measure Known Seen
""".split()
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(_OTHERS)})\..*"),
    ("py:.*", "|".join(_TYPES)),
]

html_theme = "sphinx_book_theme"
html_title = "lowrank_optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "repository_url": tables.repository(),
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_edit_page_button": True,
    # Sources of pages are not copied.
    "use_download_button": False,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    # The side bar has the search.
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "github-dark-high-contrast",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def signature(app, what, name, obj, options, args, returns):
    """Annotations as they are written: `ArrayLike`, not what it stands for."""
    if what in ("function", "method"):
        node = _node(obj)
        if what == "method":
            del node.args.args[0]
        returned = node.returns and ast.unparse(node.returns)
        return f"({ast.unparse(node.args)})", returned
    if what == "class" and hasattr(obj, "__dataclass_fields__"):
        fields = [x for x in _node(obj).body if isinstance(x, ast.AnnAssign)]
        written = [ast.unparse(x) for x in fields if x.target.id in obj.__match_args__]
        return f"({', '.join(written)})", None
    return ("", None) if what == "class" else None


def _node(obj):
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))
    return ast.parse(source).body[0]


def missing(app, env, node, content):
    """A public name of another module than that of the docstring."""
    if node.get("refdomain") != "py":
        return None
    python = env.get_domain("py")
    for module in ("lowrank_optax", "lowrank_optax.linalg"):
        name = f"{module}.{node['reftarget']}"
        if name in python.objects:
            return python.resolve_xref(
                env, node["refdoc"], app.builder, "obj", name, node, content
            )
    return None


def skip(app, what, name, obj, skip, options):
    """Fields of a NamedTuple, whose docstring says what they are."""
    return True if str(obj.__doc__).startswith("Alias for field") else None


def setup(app):
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", missing)
    tables.write(HERE / "_generated")
