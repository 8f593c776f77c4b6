"""What the book needs of Sphinx beyond its settings: a part of the build, none of the module."""

import dataclasses
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

from sphinx import addnodes

from temi.checks import allowed
from temi.config import RECIPES, TrainConfig

STATIC = Path(__file__).parent / "static"


def setup(app):
    without_thebe(app)
    app.connect("config-inited", add_buttons)
    app.connect("builder-inited", add_static_files)
    app.connect("html-page-context", add_mathematics)
    app.connect("autodoc-process-docstring", list_settings, priority=400)  # napoleon's is 500
    app.connect("doctree-read", name_functions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def without_thebe(app):
    """Thebe runs cells on a server that it fetches scripts from: jupyter-book always loads it."""
    for listeners in app.events.listeners.values():
        listeners[:] = [x for x in listeners if not x.handler.__module__.startswith("sphinx_thebe")]
    sheets = app.registry.css_files
    sheets[:] = [(name, attributes) for name, attributes in sheets if "thebe" not in name]


def add_buttons(app, config):
    """Buttons that need the address of the repository, where ``_config.yml`` has it."""
    options = config.html_theme_options
    if options.get("repository_url"):
        options |= {"use_repository_button": True, "use_source_button": True}
    else:
        options["launch_buttons"] = {}


def add_static_files(app):
    """The book's own files, KaTeX's among them: it stands in the place of MathJax from a server."""
    app.config.html_static_path.append(str(STATIC))
    app.add_css_file("book.css")


def add_mathematics(app, pagename, templatename, context, doctree):
    """KaTeX on pages with mathematics, before the script that calls it (``mathjax_path``)."""
    if app.env.get_domain("math").has_equations(pagename):
        app.add_css_file("katex/katex.min.css")
        for name in ("katex/katex.min.js", "katex/auto-render.min.js"):
            app.add_js_file(name, loading_method="defer", priority=400)


def name_functions(app, doctree):
    """Let ``[text](api.md#temi.embed)`` find what autodoc wrote: MyST knows headings alone."""
    slugs = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for signature in doctree.findall(addnodes.desc_signature):
        for name in signature["ids"]:
            slugs[name] = (signature.line, name, name)


def list_settings(app, what, name, obj, options, lines):
    """The settings of a class, with what their annotations say, as its parameters."""
    if not dataclasses.is_dataclass(obj) or what != "class":
        return
    hints = get_type_hints(obj, include_extras=True)
    described = {n: hint for n, hint in hints.items() if get_origin(hint) is Annotated}
    if not described:
        return
    section = ["Parameters", "----------"]
    for field in dataclasses.fields(obj):
        text = get_args(described[field.name])[1].description
        if obj is TrainConfig and field.name in RECIPES["fast"] | RECIPES["paper"]:
            values = [f"``{n}``: {r.get(field.name)!r}" for n, r in RECIPES.items()]
            text = f"{text}. {', '.join(values)}"
        else:
            text = f"{text}. Default: {field.default!r}"
        section += [f"{field.name} : {allowed(described[field.name])}", f"    {text}."]
    place = lines.index("Raises")
    lines[place:place] = [*section, ""]
