import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import temi
from temi import gallery

NAMES = ("<script>alert(1)<|script>.png", "a\"b'c.png", "né 日本.png", "</script>.png")
WIDTHS = [1280, 390]


@pytest.fixture
def photos(tmp_path):
    """120 images of three clusters, in colours and greys, some of hostile names; and a table."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    names = [*NAMES, *(f"img {i:03d}.png" for i in range(116))]
    for i, name in enumerate(names):
        shape = (40, 80, 3) if i % 2 else (8, 8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(root / name)
    images = temi.load_images(str(root))
    clusters = np.repeat([4, 1, 7], [60, 40, 20])
    table = pd.DataFrame(
        {"path": images.ids, "cluster": clusters, "confidence": rng.random(120),
         "agreement": rng.integers(1, 5, 120) / 4, "second_choice": np.where(clusters == 4, 7, 4),
         "distance": np.where(np.arange(120) == 5, np.nan, rng.random(120))}
    )  # fmt: skip
    return images, table


def data_of(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text[1])


def thumbnails(page):
    packs = re.findall(r'<script type="text/plain" id="pack-\d+">(.*?)</script>', page)
    return [Image.open(io.BytesIO(base64.b64decode(t))) for p in packs for t in p.split(" ")]


def test_the_page_holds_everything(photos, tmp_path):
    images, table = photos
    points = np.random.default_rng(1).normal(size=(120, 2))
    temi.write_gallery(tmp_path / "new" / "g.html", table, images, points=points, thumbnail=32)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["g.html"]
    page = (tmp_path / "new" / "g.html").read_text(encoding="utf-8")
    data = data_of(page)
    order = sorted(range(120), key=lambda i: (i >= 60, i >= 100, -table["confidence"][i]))
    assert data["path"] == [images.ids[i] for i in order]
    assert data["distance"][order.index(5)] is None
    np.testing.assert_allclose(data["confidence"], table["confidence"][order], atol=1e-4)
    pictures = thumbnails(page)
    assert len(pictures) == 120
    for i, picture in zip(order, pictures, strict=True):
        original = images.images[i]
        if original.ndim == 2:  # tiny, kept to the bit
            grey = np.asarray(picture.convert("RGB"))
            np.testing.assert_array_equal(grey, np.stack([original] * 3, axis=-1))
        else:
            assert picture.size == (32, 16)
    placed = np.stack([data["x"], data["y"]], axis=1) / 65535
    span = (points.max(axis=0) - points.min(axis=0)).max()
    np.testing.assert_allclose(placed, (points - points.min(axis=0))[order] / span, atol=1e-4)


def test_nothing_from_a_name_is_markup(photos, tmp_path):
    images, table = photos
    named = {"format": "temi-names-1", "names": {"4": "</script><img src=x onerror=alert(1)>"}}
    temi.write_gallery(
        tmp_path / "g.html", table, images, title="<b>Title</b></title>", names=named
    )
    page = (tmp_path / "g.html").read_text(encoding="utf-8")
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "<b>Title" not in page
    assert page.count("</script>") == 3  # data, one pack, the page's own
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)


def test_many_images_lie_beside_the_page(photos, tmp_path, monkeypatch):
    images, table = photos
    path = tmp_path / "g.html"
    temi.write_gallery(path, table, images)
    inline = path.read_text(encoding="utf-8")
    monkeypatch.setattr(gallery, "INLINE", 100)
    monkeypatch.setattr(gallery, "PACK", 50)
    temi.write_gallery(path, table, images)
    page = path.read_text(encoding="utf-8")
    folder = tmp_path / data_of(page)["files"]
    assert folder.parent.name == "g_files"
    packs = [(folder / f"{number}.js").read_text() for number in range(3)]
    texts = [json.loads(pack.split(", ")[1].rstrip(")\n")) for pack in packs]
    together = re.search(r'id="pack-0">(.*?)<', inline)[1]
    assert " ".join(texts) == together
    assert not thumbnails(page)
    temi.write_gallery(path, table[:110], images)
    assert [part.name for part in folder.parent.iterdir()] == [
        data_of(path.read_text(encoding="utf-8"))["key"]
    ]
    temi.write_gallery(path, table[:90], images)
    assert not list(folder.parent.iterdir())


def test_names_that_the_table_brings_along(photos, tmp_path):
    images, table = photos
    content = {"format": "temi-names-1", "names": {"4": "cats"}, "merged": {"7": 4}}
    temi.write_gallery(tmp_path / "a.html", temi.apply_names(table, content), images)
    data = data_of((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert (data["names"], data["merged"], set(data["cluster"])) == ({"4": "cats"}, {}, {1, 4})
    temi.write_gallery(tmp_path / "b.html", table, images, names=content)
    data = data_of((tmp_path / "b.html").read_text(encoding="utf-8"))
    assert (data["names"], data["merged"]) == ({"4": "cats"}, {"7": 4})


def test_other_arguments_are_refused(photos, tmp_path):
    images, table = photos
    path = tmp_path / "g.html"
    for options, message in [
        ({"thumbnail": 8}, "thumbnail=8: a whole number from 16 to 512 is allowed"),
        ({"points": np.zeros((3, 2))}, r"points: shape \(3, 2\); \(120, 2\) is allowed"),
        ({"points": np.full((120, 2), np.nan)}, "all numbers finite"),
        ({"names": {"format": "temi-names-1", "names": {"9": "x"}}}, "there is no cluster 9"),
    ]:
        with pytest.raises(ValueError, match=message):
            temi.write_gallery(path, table, images, **options)
    with pytest.raises(ValueError, match="holds no image"):
        temi.write_gallery(path, table[:0], images)
    with pytest.raises(ValueError, match="ids: 'nobody' is no image"):
        temi.write_gallery(path, table.assign(path="nobody"), images)
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def test_an_image_that_is_gone_by_now_stays_white(photos, tmp_path):
    images, table = photos
    (tmp_path / "photos" / "img 003.png").unlink()
    with pytest.warns(UserWarning, match=r"any more stays white \(No such file"):
        temi.write_gallery(tmp_path / "g.html", table, images)
    assert (tmp_path / "g.html").stat().st_size > 10_000


# in a browser


@pytest.fixture
def open_page(browser):
    """Opens a page at a width; no error may have been logged and nothing run by the end."""
    contexts, complaints = [], []

    def opener(path, width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: seen(request.url))
        page.goto(path.as_uri())
        return page

    def seen(url):
        if not url.startswith(("file:", "data:", "blob:")):
            complaints.append(url)

    yield opener
    for context in contexts:
        context.close()
    assert not complaints


def loaded(page):
    """Wait until every thumbnail near the view is painted, and count them."""
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('.tile img')];"
        " return all.length && all.every((img) => img.complete && img.naturalWidth); }"
    )
    return page.locator(".tile img").count()


def headings(page):
    return page.locator("section.group:visible h2").all_inner_texts()


def shown_names(page, cluster):
    tiles = page.locator(f'section[data-cluster="{cluster}"] .tile')
    return tiles.evaluate_all("tiles => tiles.map((tile) => tile.title)")


def fits(page):
    root = "document.documentElement"
    return page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")


@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens(photos, tmp_path, open_page, width):
    images, table = photos
    path = tmp_path / "g.html"
    temi.write_gallery(path, table, images, title="My <b>photos</b>")
    page = open_page(path, width)
    assert loaded(page) > 30
    assert page.locator("h1").inner_text() == page.title() == "My <b>photos</b>"
    assert headings(page) == ["Cluster 4", "Cluster 1", "Cluster 7"]
    mean = table["confidence"][:60].mean()
    facts = page.locator('section[data-cluster="4"] .top').inner_text()
    assert f"60 images · mean confidence {mean:.2f}" in facts
    assert not page.locator("#tab-map").is_visible()
    assert fits(page)


def test_names_are_shown_as_they_are(photos, tmp_path, open_page):
    images, table = photos
    temi.write_gallery(tmp_path / "g.html", table, images)
    page = open_page(tmp_path / "g.html")
    for name in NAMES:
        page.fill("#search", name)
        page.wait_for_function(
            "(name) => { const all = [...document.querySelectorAll('.tile')];"
            " return all.length === 1 && all[0].title === name; }",
            arg=name,
        )
        page.locator(".tile").click()
        row = table[table["path"] == name].iloc[0]
        assert page.locator("#look h2").inner_text() == name
        facts = page.locator("#look dl").inner_text()
        for fact in (f"Cluster {row.cluster}", f"Cluster {row.second_choice}"):
            assert fact in facts
        shown = float(re.search(r"Confidence\s+(\S+)", facts)[1])
        assert shown == pytest.approx(row.confidence, abs=1e-3)
        page.keyboard.press("Escape")
    page.fill("#search", "no such name")
    page.locator(".none").wait_for()
    assert headings(page) == []


def test_order(photos, tmp_path, open_page):
    images, table = photos
    temi.write_gallery(tmp_path / "g.html", table, images)
    page = open_page(tmp_path / "g.html")
    loaded(page)
    own = table[table["cluster"] == 7].set_index("path")
    for key in ("confidence", "agreement", "distance"):
        page.select_option("#sort", key)
        assert page.locator("#direction").inner_text() == ("↑" if key == "distance" else "↓")
        for _ in range(2):
            loaded(page)
            values = own.loc[shown_names(page, 7), key].to_numpy()
            down = page.locator("#direction").inner_text() == "↓"
            steps = np.diff(values[~np.isnan(values)])
            assert (steps <= 0).all() if down else (steps >= 0).all()
            page.click("#direction")
    page.select_option("#sort", "name")
    loaded(page)
    assert shown_names(page, 7) == sorted(own.index)


def test_more_is_shown_on_demand(photos, tmp_path, open_page):
    images, table = photos
    temi.write_gallery(tmp_path / "g.html", table, images)
    page = open_page(tmp_path / "g.html", 390)
    loaded(page)
    before = shown_names(page, 4)
    assert len(before) == 20
    page.locator('section[data-cluster="4"] .more button').click()
    loaded(page)
    after = shown_names(page, 4)
    assert (len(after), after[:20]) == (60, before)
    page.get_by_role("button", name="Show fewer").click()
    assert shown_names(page, 4) == before


def merge(page, source, target):
    page.get_by_role("button", name=f"Merge {source} into another cluster").click()
    page.fill("#filter", target)
    page.locator("#choices button").click()


def rename(page, old, new):
    page.get_by_role("button", name=f"Rename {old}", exact=True).click()
    page.keyboard.type(new)
    page.keyboard.press("Enter")


def download(page, path):
    with page.expect_download() as waiting:
        page.click("#download")
    waiting.value.save_as(path)
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_rename_merge_download_apply(photos, tmp_path, open_page, width):
    images, table = photos
    temi.write_gallery(tmp_path / "g.html", table, images)
    page = open_page(tmp_path / "g.html", width)
    rename(page, "Cluster 1", 'cats <img src=x onerror=alert(1)> "é"')
    rename(page, "Cluster 7", "dogs")
    merge(page, "dogs", "cats")
    cats = 'cats <img src=x onerror=alert(1)> "é"'
    assert headings(page) == [cats, "Cluster 4"]  # of 60 images each: the lower number first
    assert fits(page)

    path = download(page, tmp_path / "names.json")
    named = temi.apply_names(table, path)
    assert set(named["name"]) == {cats, "4"}
    for cluster in (1, 4):
        section = page.locator(f'section[data-cluster="{cluster}"]')
        while (button := section.get_by_role("button", name="Show more of")).is_visible():
            button.click()
        assert set(shown_names(page, cluster)) == set(named["path"][named["cluster"] == cluster])

    page.reload()
    assert headings(page) == [cats, "Cluster 4"]
    page.get_by_role("button", name="Take dogs out of").click()
    assert headings(page) == ["Cluster 4", cats, "dogs"]
    page.click("#undo")
    assert headings(page) == [cats, "Cluster 4"]

    temi.write_gallery(tmp_path / "named.html", table, images, names=path)
    assert headings(open_page(tmp_path / "named.html", width)) == [cats, "Cluster 4"]


def test_undo_at_once(photos, tmp_path, open_page):
    images, table = photos
    temi.write_gallery(tmp_path / "g.html", table, images)
    page = open_page(tmp_path / "g.html")
    merge(page, "Cluster 7", "Cluster 4")
    assert headings(page) == ["Cluster 4", "Cluster 1"]
    page.locator("#toast button").click()
    assert headings(page) == ["Cluster 4", "Cluster 1", "Cluster 7"]
    rename(page, "Cluster 1", "cats")
    rename(page, "cats", " ")
    assert headings(page) == ["Cluster 4", "Cluster 1", "Cluster 7"]


def test_two_galleries_do_not_mix(photos, tmp_path, open_page):
    images, table = photos
    temi.write_gallery(tmp_path / "a.html", table, images)
    temi.write_gallery(tmp_path / "b.html", table[:100], images)
    page = open_page(tmp_path / "a.html")
    rename(page, "Cluster 1", "cats")
    page.goto((tmp_path / "b.html").as_uri())
    assert headings(page) == ["Cluster 4", "Cluster 1"]
    page.goto((tmp_path / "a.html").as_uri())
    assert headings(page) == ["Cluster 4", "cats", "Cluster 7"]


def test_names_are_loaded_and_others_refused(photos, tmp_path, open_page):
    images, table = photos
    temi.write_gallery(tmp_path / "g.html", table, images)
    page = open_page(tmp_path / "g.html")
    good = {"format": "temi-names-1", "names": {"1": "cats"}, "merged": {"7": 1, "1": 4}}
    path = tmp_path / "names.json"
    path.write_text(json.dumps(good))
    page.set_input_files("#file", path)
    page.get_by_text("Names loaded").wait_for()
    assert headings(page) == ["Cluster 4"]
    assert json.loads(download(page, tmp_path / "out.json").read_text()) == good
    for change in ({"format": "x"}, {"names": {"9": "x"}}, {"names": {"1": ""}},
                   {"merged": {"7": 1, "1": 7}}, {"merged": {"7": "x"}}):  # fmt: skip
        path.write_text(json.dumps(good | change))
        page.locator("#toast").evaluate("toast => toast.replaceChildren()")
        page.set_input_files("#file", path)
        page.get_by_text("was not loaded").wait_for()
        assert headings(page) == ["Cluster 4"]


@pytest.mark.parametrize("width", WIDTHS)
def test_map(photos, tmp_path, open_page, width):
    images, table = photos
    points = np.random.default_rng(1).normal(size=(120, 2))
    points[0] = (0, 9)  # alone at the foot
    temi.write_gallery(tmp_path / "g.html", table, images, points=points)
    page = open_page(tmp_path / "g.html", width)
    page.click("#tab-map")
    drawn = (
        "() => { const c = document.querySelector('canvas');"
        " return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v); }"
    )
    page.wait_for_function(drawn)
    assert fits(page)
    box = page.locator("canvas").bounding_box()
    place = page.evaluate(
        "(name) => { const i = D.path.indexOf(name);"
        " return [D.x[i] * view.scale + view.x, D.y[i] * view.scale + view.y]; }",
        table["path"][0],
    )
    page.mouse.move(box["x"] + place[0], box["y"] + place[1])
    assert page.locator("#tip .file").inner_text() == table["path"][0]
    assert page.locator("#tip .cluster").inner_text() == "Cluster 4"
    page.wait_for_function("() => document.querySelector('#tip img').naturalWidth > 0")
    scale = page.evaluate("view.scale")
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"() => view.scale > {scale}")
    page.get_by_role("button", name="Show all").click()
    assert page.evaluate("view.scale") == pytest.approx(scale)
    page.locator("#legend button").first.click()
    assert page.locator("#legend button[aria-pressed=true]").inner_text().startswith("Cluster 4")


def test_a_gallery_with_its_files_beside_it(photos, tmp_path, open_page, monkeypatch):
    images, table = photos
    monkeypatch.setattr(gallery, "INLINE", 100)
    monkeypatch.setattr(gallery, "PACK", 50)
    for name in ("g.html", "photos #1, 100%?.html"):
        temi.write_gallery(tmp_path / name, table, images)
        assert loaded(open_page(tmp_path / name)) > 100
