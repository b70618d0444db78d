"""Settings of the documentation, `make docs`.

The source folder is the repository, so links between its files lead on the site too. Nothing is
fetched. generate.py writes the pages below docs/generated from the code, before anything is read.
"""

import os
import re
import sys
from importlib.metadata import distribution
from importlib.metadata import version as version_of
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx import addnodes

sys.path.insert(0, str(Path(__file__).parent))
import generate

ROOT = Path(__file__).parents[1]
generate.write_pages(ROOT / "docs/generated")

project, author, copyright = "dsv3-jax", "The dsv3-jax authors", "The dsv3-jax authors, Apache-2.0"
version = release = version_of("dsv3-jax")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md", "docs/**/*.md", "notebooks/*.ipynb", "experiments/*.md", "experiments/*/*.md",
    "experiments/scale/launch/*.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
]  # fmt: skip
exclude_patterns = [
    ".*", "runs", "build", "docs/_build", "shared", "experiments/scale/plan_table.md",
    "docs/generated/front.md",
]  # fmt: skip

html_theme, html_title = "furo", "dsv3-jax"
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
# it fetches each page that is found, which a browser refuses for files
html_show_search_summary = False
# MathJax in one file of the site, which draws formulas as SVG: it asks for no other file.
MATHJAX = distribution("sphinx-mathjax-offline").locate_file(
    "sphinx-mathjax-offline/static/mathjax/tex-svg.js"
)
html_static_path, html_css_files = ["site.css", str(MATHJAX)], ["site.css"]
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}  # the menu could ask for further files
add_module_names = False

nb_execution_mode = "off"  # the notebooks keep their outputs
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

default_role = "literal"  # docstrings are plain text with `names`
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_google_docstring, napoleon_numpy_docstring, napoleon_use_ivar = True, False, True
napoleon_custom_sections = ["Source", "Departs from the paper", "Letters"]
suppress_warnings = ["ref.python"]  # `tokens` in an option's type is no attribute of that name
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures: other projects' have no page here
python_use_unqualified_type_names = True


SECTIONS = (
    "Args:", "Returns:", "Raises:", "Example:", "Yields:", "Source:", "Departs from the paper:",
    "Letters:",
)  # fmt: skip


def _as_text(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText; equations and tables, indented outside of sections, stay."""
    out: list[str] = []
    state = ""  # where indented lines belong
    example = False
    for line in lines:
        indented, blank = line.startswith("    "), not line.strip()
        if not indented and not blank:
            name = next((name for name in SECTIONS if line.startswith(name)), "")
            if name and line != name:  # a section of one paragraph
                out += ["", f"**{name}**{_escaped(line.removeprefix(name))}"]
                state = "paragraph"
                continue
            out += [""] if state in ("paragraph", "literal") or name else []
            state = name
        elif indented and state == "paragraph":
            out.append(_escaped(line.strip()))
            continue
        elif indented and not state and ">>>" not in line:
            state = "literal"
            out += ["", "::", ""]
        example = (example and not blank) or ">>>" in line
        out.append(line if state == "literal" or example else _escaped(line))
    return out


def _escaped(line: str) -> str:
    """Signs of reStructuredText outside of `names` are themselves."""
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [
        re.sub(r"([*|])|_(?!\w)", lambda found: "\\" + found[0], part) for part in parts[::2]
    ]
    return "".join(parts)


def setup(app):
    in_place = lambda *args: args[-1].__setitem__(slice(None), _as_text(args[-1]))  # noqa: E731
    app.connect("autodoc-process-docstring", in_place, 400)
    app.connect("source-read", _say_commit)
    app.connect("doctree-resolved", _show_sources)
    app.connect("build-finished", _send_to_docs)


def _say_commit(app, page, source) -> None:
    """A notebook's last line names the commit whose outputs it has."""
    if page.startswith("notebooks/"):
        book = nbformat.reads(source[0], as_version=4)
        text = f"*The outputs are those of commit `{book.metadata['dsv3_jax']['commit']}`.*"
        book.cells.append(nbformat.v4.new_markdown_cell(text))
        source[0] = nbformat.writes(book)


def _show_sources(app, tree, page) -> None:
    """A link to a Python file leads to its highlighted source if the site has it, or downloads."""
    shown = getattr(app.env, "_viewcode_modules", {})
    for node in list(tree.findall(addnodes.download_reference)):
        path = Path(os.path.normpath(Path(page).parent / node["reftarget"].lstrip("/")))
        if ".".join(path.with_suffix("").parts) in shown:
            target = app.builder.get_relative_uri(
                page, f"_modules/{path.with_suffix('').as_posix()}"
            )
            node.replace_self(nodes.reference("", "", *node.children, refuri=target))


def _send_to_docs(app, error) -> None:
    """The root of the site leads to its first page."""
    if error is None and app.builder.format == "html":
        text = (
            '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">'
            "<title>dsv3-jax</title>"
        )
        (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")
