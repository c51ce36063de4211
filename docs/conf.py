"""How Sphinx builds these pages: `make docs`. Nothing is fetched, every warning is an error."""

import inspect
import json
import re
import statistics
from importlib import import_module
from pathlib import Path

from sphinx.errors import SphinxError

import urm_kernels

ROOT = Path(__file__).parent.parent

project = "urm_kernels"
author = "the urm_kernels authors"
project_copyright = "the urm_kernels authors, Apache-2.0"
version = release = urm_kernels.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "figures"]

html_theme = "furo"
html_title = "urm_kernels"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False

myst_enable_extensions = ["substitution", "colon_fence"]
myst_heading_anchors = 3

# Pages with code cells are executed at every build, in the folder of the build: an error there is an error here.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell; torch.compile on a busy machine

autodoc_default_options = {"members": True, "inherited-members": "Module,tuple"}
autodoc_inherit_docstrings = False  # what only overrides torch.nn.Module is torch's to document
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # what stands before the colon is a shape, and belongs to the sentence

# -n asks for a target of every name. Our own have to be there; to know other projects' a build would need the network,
# and what stands for a type in a docstring is often prose: "[B, C] float32".
nitpick_ignore_regex = [("py:.*", r"(?!urm_kernels\b).*")]
# Between the table, the ops and the backends, for none to change alone.
nitpick_ignore = [("py:class", "urm_kernels.table.Serving"), ("py:class", "urm_kernels.backends.codes.Codes")]

linkcheck_timeout = 20
linkcheck_retries = 2


def median_ms(cell):
    """(ours, the fastest peer's): medians over the three committed runs, as in README."""
    found = []
    for run in ("_run1", "_run2", "_run3"):
        cells = json.loads((ROOT / f"bench/results/latency_cpu{run}.json").read_text())["cells"]
        found.append({c["cell"]: c for c in cells}[cell])
    peers = [name for name in found[0]["peers_ms"] if all(name in c["peers_ms"] for c in found)]
    return (
        statistics.median(c["ms"] for c in found),
        min(statistics.median(c["peers_ms"][name] for c in found) for name in peers),
    )


OURS, FASTEST_PEER = median_ms("fp32 r=64 B=32 M=16 k=100")
myst_substitutions = {
    "ours": f"{OURS:.0f} ms",
    "fastest_peer": f"{FASTEST_PEER:.0f} ms",
    "ratio": f"{FASTEST_PEER / OURS:.0f}",
}

# What a reader looks for first; names that are not here follow by themselves.
FIRST = ("score_topk", "score_candidates", "log_partition", "ItemTable", "TopK")


def public(module):
    """The names that a module shows: its __all__, else what is defined in it."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    names = [name for name in names if not name.startswith("_")]
    return sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def entry(module, name):
    value = getattr(module, name)
    kind = "class" if inspect.isclass(value) else "function" if callable(value) else "data"
    return [f".. auto{kind}:: {module.__name__}.{name}", ""]


def summary(module):
    """A table of names and the first paragraph of each docstring."""
    lines = [".. list-table::", "   :widths: 30 70", ""]
    for name in public(module):
        value = getattr(module, name)
        text = inspect.getdoc(value) if callable(value) else ""
        first = " ".join((text or "").partition("\n\n")[0].split())
        lines += [f"   * - :py:obj:`{name} <{module.__name__}.{name}>`", f"     - {first.removesuffix('::')}"]
    return lines


def reference(name):
    """All that a module shows: its docstring, a table, the entries."""
    module = import_module(name)
    names = [line for shown in public(module) for line in entry(module, shown)]
    return "\n".join([f".. py:module:: {name}", "", inspect.getdoc(module), "", *summary(module), "", *names])


def list_names(app, docname, source):
    """Lines "@reference MODULE@" of api.md become the public names as they are at this build."""
    if docname == "api":
        source[0] = re.sub(r"^@reference ([\w.]+)@$", lambda m: reference(m[1]), source[0], flags=re.MULTILINE)


def skip_field_aliases(app, what, name, value, skip, options):
    """Fields of named tuples are told about in the tuple's own docstring."""
    return True if (inspect.getdoc(value) or "").startswith("Alias for field number") else None


def where_it_is_shown(app, env, node, contnode):
    """Annotations name the module that defines a class; its entry is under the one that shows it."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("urm_kernels."):
        return None
    name = target.rpartition(".")[2]
    if name not in urm_kernels.__all__:
        return None
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", f"urm_kernels.{name}", node, contnode)


REMOTE = re.compile(
    r"""<(?:script|img|iframe|source|audio|video|embed|object)\b[^>]*\b(?:src|srcset|data)=["']?(?:https?:)?//[^>]*"""
    r"""|<link\b(?![^>]*rel=["']?(?:canonical|license))[^>]*\bhref=["']?(?:https?:)?//[^>]*"""
    r"""|url\(["']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*""",
    re.IGNORECASE,
)


def nothing_remote(app, error):
    """A page that needs something from elsewhere would be broken without a network, and tell others who reads it."""
    if error is not None or app.builder.format != "html":
        return
    files = [path for path in Path(app.outdir).rglob("*") if path.suffix in (".html", ".css")]
    found = [f"{path.name}: {match[0]}" for path in files for match in REMOTE.finditer(path.read_text("utf-8"))]
    if found:
        raise SphinxError("pages that load something from elsewhere:\n" + "\n".join(sorted(set(found))))


def setup(app):
    app.connect("source-read", list_names)
    app.connect("autodoc-skip-member", skip_field_aliases)
    app.connect("missing-reference", where_it_is_shown)
    app.connect("build-finished", nothing_remote)
