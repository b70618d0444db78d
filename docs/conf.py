"""Settings of the documentation, `make docs`.

The source folder is the repository, so links between its files lead on the site too. Nothing is
fetched. generate.py writes the pages below docs/generated from the code, before anything is read.
"""

import inspect
import json
import os
import re
import sys
from functools import cached_property
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
exclude_patterns = [".*", "runs", "build", "docs/_build", "shared", "docs/generated/front.md"]

html_theme, html_title = "furo", "dsv3-jax"
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
# Sphinx's own excerpts fetch each page that is found, which a browser refuses for files: search.js
# has the pages' text in a script of the site.
html_show_search_summary, html_search_scorer = False, str(Path(__file__).parent / "search.js")
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


def _read_docstring(app, what, name, found, options, lines: list[str]) -> None:
    """A docstring, and beneath a record's the list of its fields."""
    lines[:] = _as_text(lines)
    if what == "class" and _fields_of(found):
        lines += ["", *_describe_fields(found)]
    if what == "property":
        lines[:0] = ["..", ""]  # napoleon takes words before a colon in the first line for a type


def _fields_of(found) -> tuple[str, ...]:
    return getattr(found, "_fields", None) or tuple(getattr(found, "__dataclass_fields__", ()))


def _describe_fields(found) -> list[str]:
    """A list of a record's fields: type and default as in its source, and the comment there."""
    described, above = [], []
    for line in inspect.getsource(found).splitlines():
        code, _, comment = line.strip().partition("# ")
        name, _, kind = code.strip().partition(": ")
        if name in _fields_of(found) and line.startswith(f"    {name}"):
            text = _escaped(" ".join([comment] if comment else above))
            described.append(f"- **{name}** ``{kind}``" + (f": {text}" if text else ""))
        above = [*above, comment] if comment and not code else []
    return described


def _skip_field(app, what, name, found, skip, options):
    """Leave out the fields of a record, which its docstring lists; keep methods and properties."""
    members = (property, cached_property, classmethod, staticmethod)
    is_member = inspect.isroutine(found) or isinstance(found, members)
    return True if what == "class" and not is_member else None


def _shorten_signature(app, what, name, found, options, signature, returned):
    """A record's fields stand below it, with their types and meanings."""
    return ("(…)", returned) if what == "class" and len(_fields_of(found)) > 4 else None


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
    app.connect("autodoc-process-docstring", _read_docstring, 400)
    app.connect("source-read", _say_commit)
    app.connect("env-updated", _link_back)
    app.connect("doctree-resolved", _show_sources)
    app.connect("autodoc-skip-member", _skip_field)
    app.connect("autodoc-process-signature", _shorten_signature)
    app.connect("html-page-context", _search_excerpts)
    app.connect("build-finished", _write_excerpts)
    app.connect("build-finished", _send_to_docs)


def _say_commit(app, page, source) -> None:
    """A notebook's last line names the commit whose outputs it has."""
    if page.startswith("notebooks/"):
        book = nbformat.reads(source[0], as_version=4)
        text = f"*The outputs are those of commit `{book.metadata['dsv3_jax']['commit']}`.*"
        book.cells.append(nbformat.v4.new_markdown_cell(text))
        source[0] = nbformat.writes(book)


def _link_back(app, env) -> None:
    """A source's link to its docstring leads to the page that has the entry, not to a topic's."""
    entries = env.get_domain("py").objects
    for module, source in getattr(env, "_viewcode_modules", {}).items():
        pages = source[2] if source else {}
        for name in pages:
            if entry := entries.get(f"{module}.{name}"):
                pages[name] = entry.docname


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


def _search_excerpts(app, page, template, context, tree) -> None:
    if page == "search":
        app.add_js_file("excerpts.js", priority=100)  # search.js ranks by it


def _write_excerpts(app, error) -> None:
    """The text of each section of each page, which search.js shows: {page: {anchor: text}}."""
    if error is not None or app.builder.format != "html":
        return
    texts: dict[str, dict[str, str]] = {}
    for page in sorted(app.env.found_docs):
        tree = app.env.get_doctree(page)
        texts[page] = {"": _words(tree)}
        for section in list(tree.findall(nodes.section))[1:]:
            texts[page] |= dict.fromkeys(section["ids"], _words(section))
    script = f"const EXCERPTS = {json.dumps(texts, ensure_ascii=False)};\n"
    (Path(app.outdir) / "_static/excerpts.js").write_text(script, encoding="utf-8")


def _words(tree) -> str:
    """The text of all below a node, in one line, without headings."""
    blocks = (nodes.paragraph, nodes.literal_block)
    found = [node.astext() for node in tree.findall(lambda node: isinstance(node, blocks))]
    return " ".join(" ".join(found).split())


def _send_to_docs(app, error) -> None:
    """The root of the site leads to its first page."""
    if error is None and app.builder.format == "html":
        text = (
            '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">'
            "<title>dsv3-jax</title>"
        )
        (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")
