"""The built book: complete, offline, light, legible; and its pages say what is so."""

import gzip
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup

import temi

ROOT = Path(__file__).parents[1]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"])]
LOCK = (ROOT / "requirements.lock").read_text()
WEIGHT = 2_000_000  # bytes that a page may load in all, texts compressed as servers send them
LOADING = {  # what a page loads by itself, and where its address stands
    "script": ("src",), "link": ("href",), "img": ("src", "srcset"), "iframe": ("src",),
    "source": ("src", "srcset"), "video": ("src", "poster"), "audio": ("src",),
    "object": ("data",), "embed": ("src",), "use": ("href", "xlink:href"),
}  # fmt: skip


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The folder of the book's pages, built from the stored outputs without a warning."""
    out = tmp_path_factory.mktemp("book")
    program = "from jupyter_book.cli.main import main; main()"
    options = ["--all", "-W", "-n", "--keep-going", "--path-output", str(out)]
    command = [sys.executable, "-c", program, "build", str(ROOT), *options]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]
    return out / "_build" / "html"


@pytest.fixture(scope="module")
def soups(book):
    """Page -> its parsed text, the index and the search among them."""
    pages = [*PAGES, "genindex", "search"]
    return {page: BeautifulSoup((book / f"{page}.html").read_text(), "html.parser")
            for page in pages}  # fmt: skip


def addresses(soup) -> list[tuple[str, str]]:
    """Tag and address of whatever a page loads by itself; links to other pages are none."""
    found = []
    for tag, names in LOADING.items():
        for element in soup.find_all(tag):
            relation = set(element.get("rel", ()))
            if relation & {"index", "search", "next", "prev", "canonical", "author", "help"}:
                continue
            found += [(tag, element[name]) for name in names if element.get(name)]
    return found


def test_no_warning_is_kept_quiet():
    settings = CONFIG["sphinx"]["config"]
    assert settings["suppress_warnings"] == []
    assert not {"nitpick_ignore", "nitpick_ignore_regex"} & set(settings)


def test_nothing_comes_from_elsewhere(book, soups):
    for page, soup in soups.items():
        for tag, address in addresses(soup):
            assert not urlsplit(address).netloc, f"{page}: {tag} {address}"
            assert urlsplit(address).scheme in ("", "data"), f"{page}: {tag} {address}"
        for script in soup.find_all(["script", "style"], src=None):
            assert not re.search(r"https?:|@import", script.text), f"{page}: {script.text[:200]}"
        for script in soup.find_all("script"):
            for widget in ("require.min.js", "plotly", "thebe", "widget"):
                assert widget not in str(script), f"{page}: {script}"
    outside = re.compile(r"""(url\(|@import)\s*["']?(https?:)?//""")
    for sheet in book.rglob("*.css"):
        assert not outside.search(sheet.read_text()), sheet


def test_links_lead_somewhere(book, soups):
    ids = {page: {e.get("id") or e.get("name") for e in soup.find_all(True)}
           for page, soup in soups.items()}  # fmt: skip
    for page, soup in soups.items():
        folder = (book / page).parent
        for link in soup.find_all("a", href=True):
            target = urlsplit(link["href"])
            if target.scheme or target.netloc:
                continue
            path = (
                (folder / unquote(target.path)).resolve() if target.path else book / f"{page}.html"
            )
            assert path.is_file(), f"{page}: {link['href']}"
            if target.fragment and path.suffix == ".html":
                name = path.relative_to(book.resolve()).with_suffix("").as_posix()
                assert name in ids, f"{page}: {link['href']}"
                assert unquote(target.fragment) in ids[name], f"{page}: {link['href']}"


@pytest.mark.parametrize("page", PAGES)
def test_figures_have_a_text(soups, page):
    for image in soups[page].find("article").find_all("img"):
        text = image.get("alt", "")
        assert len(text) > 20, f"{page}: {image['src']}: {text!r} is no text for it"
        assert not text.endswith((".png", ".jpg", ".svg")), f"{page}: {text}"


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_light(book, soups, page):
    folder, weight = (book / page).parent, len(gzip.compress((book / f"{page}.html").read_bytes()))
    files = [urlsplit(address) for _, address in addresses(soups[page])]
    for path in {file.path for file in files if file.scheme != "data"} - {""}:
        content = (folder / unquote(path)).read_bytes()
        text = path.endswith((".js", ".css", ".svg"))
        weight += len(gzip.compress(content)) if text else len(content)
    assert weight < WEIGHT, f"{page}: {weight / 1e6:.2f} MB"


def test_mathematics_is_a_pinned_copy():
    katex = ROOT / "_book" / "static" / "katex"
    (version,) = set(re.findall(r'content:"(0\.\d+\.\d+)"', (katex / "katex.min.css").read_text()))
    assert f'version:"{version}"' in (katex / "katex.min.js").read_text()
    assert "MIT License" in (katex / "LICENSE").read_text()
    fonts = set(re.findall(r"fonts/[\w-]+\.woff2", (katex / "katex.min.css").read_text()))
    assert {f"fonts/{path.name}" for path in (katex / "fonts").iterdir()} == fonts
    assert all(path.stat().st_size < 1e6 for path in katex.rglob("*"))


def test_the_reference_holds_every_public_name(soups):
    ids = {element["id"] for element in soups["api"].find_all(id=True)}
    missing = {f"temi.{name}" for name in temi.__all__} - ids
    modules = ("backbones", "costs", "distributed", "embeddings", "files", "plots", "trouble")
    assert missing == {f"temi.{name}" for name in modules}  # of which names are there:
    assert all(any(id.startswith(f"{name}.") for id in ids) for name in missing)
    assert "temi.plots.cluster_rows" in ids


def test_settings_are_listed_with_all_recipes(soups):
    text = soups["api"].find(id="temi.TrainConfig").find_parent("dl").get_text("")
    assert re.search(r"teacher_momentum \(.*?\).* fast: 0\.9, best: 0\.9, paper: 0\.996\.", text)


def test_files_that_contributors_are_sent_to():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|yml|md|toml|lock))`", text):
        assert (ROOT / name).exists(), name
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= set(targets)
    backbones, data, losses, config = (
        (ROOT / "temi" / f"{name}.py").read_text()
        for name in ("backbones", "data", "losses", "config")
    )
    for name, source in (("BACKBONES = ", backbones), ("def load_backbone", backbones),
                         ("SPLITS: ", data), ("def _from_torchvision", data),
                         ("def temi_loss", losses), ("    loss: Annotated[", config)):  # fmt: skip
        assert name in source


def test_run_times_of_every_chapter():
    table = pd.read_csv(ROOT / "results" / "run_times.csv")
    assert [f"notebooks/{chapter}" for chapter in table["Chapter"]] == [
        page for page in PAGES if page.startswith("notebooks/")
    ]
    versions = pd.read_csv(ROOT / "results" / "versions.csv", index_col="What")["Here"]
    locked = dict(re.findall(r"^([\w-]+)==([^\s;]+)", LOCK, re.MULTILINE))
    assert versions["torch"].split("+")[0] == locked["torch"]


def test_licences_are_those_that_timm_states():
    import timm

    for model in ("vit_base_patch14_dinov2.lvd142m", "vit_giant_patch14_reg4_dinov2.lvd142m",
                  "tf_efficientnet_lite0.in1k"):  # fmt: skip
        assert timm.get_pretrained_cfg(model).license == "apache-2.0"


# in a browser


@pytest.fixture(scope="module")
def open_page(browser, book):
    """Opens a page without a network; gives it and the list that errors are noted in."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    context.set_default_timeout(120_000)
    context.add_init_script("localStorage.setItem('mode', 'light')")

    def opener(name):
        page, errors = context.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(request.url))
        page.on("console", lambda line: line.type in ("error", "warning")
                and errors.append(line.text))  # fmt: skip
        file, _, query = name.partition("?")
        page.goto(f"{(book / file).as_uri()}?{query}")
        return page, errors

    yield opener
    context.close()


# Rules that axe finds broken by markup that is not ours.
FOREIGN = {
    ("aria-required-children", "citation-list"),  # docutils' list of references
}
AXE = """axe.run({exclude: [['.katex']]}, {resultTypes: ['violations']}).then((result) =>
  result.violations.flatMap(({id, impact, nodes}) => nodes.map(({html}) => [id, impact, html])))"""
OVERFLOW = """() => {
  const root = document.documentElement, wide = [];
  if (root.scrollWidth > root.clientWidth) wide.push(`the page: ${root.scrollWidth}`);
  for (const element of document.querySelectorAll("article *")) {
    const {right, width} = element.getBoundingClientRect();
    if (!width || right <= root.clientWidth + 1) continue;
    let around = element.parentElement;
    while (around && getComputedStyle(around).overflowX === "visible") {
      around = around.parentElement;
    }
    if (!around || around === document.body) wide.push(element.outerHTML.slice(0, 200));
  }
  return wide;
}"""
MATHEMATICS = """() => [".math", ".math .katex", ".katex-error"].map(
  (selector) => document.querySelectorAll(selector).length)"""


@pytest.mark.parametrize("page", PAGES)
def test_pages_look_right(open_page, page):
    """On desktop and phone, in both themes: no error, nothing cut off, readable for all."""
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe is not installed")
    opened, errors = open_page(f"{page}.html")
    assert not errors
    marked, typeset, wrong = opened.evaluate(MATHEMATICS)
    assert (typeset >= marked, wrong) == (True, 0)
    for width, theme, searched in ((1280, "light", True), (1280, "dark", False),
                                   (390, "light", False), (390, "dark", True)):  # fmt: skip
        if opened.viewport_size["width"] != width:
            opened.set_viewport_size({"width": width, "height": 900})
            opened.reload()  # the theme looks once at what scrolls
        if searched:
            opened.evaluate(Path(axe.AXE_FILE_PATH).read_text(encoding="utf-8"))
        opened.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        assert not opened.evaluate(OVERFLOW), f"{width} {theme}"
        for rule, impact, html in opened.evaluate(AXE) if searched else ():
            foreign = any(rule == name and where in html for name, where in FOREIGN)
            assert impact in ("minor", "moderate") or foreign, f"{width} {theme}: {rule} {html}"
    opened.close()


def test_search_finds(open_page):
    page, _ = open_page("search.html?q=neighbour")
    page.wait_for_selector("#search-results li")
    assert any("02_embeddings" in link.get_attribute("href")
               for link in page.locator("#search-results li a").all())  # fmt: skip


def test_documented_names_need_no_further_import():
    """`import temi` alone, in a process that has imported nothing else."""
    api = (ROOT / "api.md").read_text()
    names = re.findall(r"^\.\. (?:auto\w+|py:\w+):: (temi\.[\w.]+)$", api, re.MULTILINE)
    assert len(names) > 40
    subprocess.run([sys.executable, "-c", f"import temi; {'; '.join(names)}"], check=True)
