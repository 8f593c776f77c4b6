"""How long galleries of 10,000 and of 100,000 images take to write and to open, and their size.

Thumbnails of 64 pixels at most, of images in a folder; 100,000 are the same images ten times. The
clusters are drawn at random, 20 and 200 of them, for how images are grouped does not matter here.
Opening is timed in headless Chromium, from the call to the first section's thumbnails being
painted, three times in fresh profiles; the heap is that of JavaScript after that and a collection
of garbage. Searching is the time from the last key to the answer, of which 0.15 s are waited for
another key. Writes results/benchmarks/gallery.json.

    python benchmarks/gallery.py PATH-TO-CIFAR10-JPEG/test
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from playwright.sync_api import Browser, sync_playwright

import temi
from temi.files import write_json
from temi.image_files import ImageFiles

RESULTS = Path(__file__).parents[1] / "results" / "benchmarks" / "gallery.json"
SIZES = {10_000: 20, 100_000: 200}  # images -> clusters
ROUNDS = 3
PAINTED = """() => {
  const first = [...document.querySelectorAll("section.group .grid")][0];
  const images = first ? [...first.querySelectorAll("img")] : [];
  return images.length && images.every((image) => image.complete && image.naturalWidth);
}"""


def repeated(images: temi.ImageSet, count: int) -> temi.ImageSet:
    """So many images, the given ones over and over."""
    times = -(-count // len(images))
    files = ImageFiles(images.images.root, (images.images.names * times)[:count])
    ids = tuple(f"{i:06d}/{name}" for i, name in enumerate((images.ids * times)[:count]))
    return temi.ImageSet(images.name, files, ids)


def random_table(images: temi.ImageSet, clusters: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    count = len(images)
    return pd.DataFrame(
        {"path": images.ids, "cluster": rng.integers(clusters, size=count),
         "confidence": rng.random(count), "agreement": rng.integers(1, 17, count) / 16,
         "second_choice": rng.integers(clusters, size=count), "distance": rng.random(count)}
    )  # fmt: skip


def opened(browser: Browser, path: Path) -> dict[str, float]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    clock = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_function(PAINTED, polling="raf")
    seconds = time.perf_counter() - clock
    session = context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    heap = session.send("Runtime.getHeapUsage")["usedSize"]
    page.fill("#search", "00012")
    clock = time.perf_counter()
    page.wait_for_function("() => query", polling="raf")
    search = time.perf_counter() - clock
    context.close()
    return {"open_s": seconds, "heap_mb": heap / 1e6, "search_s": search}


def measure(images: temi.ImageSet, clusters: int, browser: Browser, folder: Path) -> dict:
    table = random_table(images, clusters)
    points = np.random.default_rng(0).normal(size=(len(images), 2))
    path = folder / "gallery.html"
    clock = time.perf_counter()
    temi.write_gallery(path, table, images, points=points)
    write = time.perf_counter() - clock
    rounds = [opened(browser, path) for _ in range(ROUNDS)]
    beside = sum(file.stat().st_size for file in folder.rglob("*.js"))
    row = {"images": len(images), "clusters": clusters, "write_s": write,
           "page_mb": path.stat().st_size / 1e6, "beside_mb": beside / 1e6}  # fmt: skip
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        row |= {name: statistics.median(values), f"{name}_max": max(values)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    images = temi.load_images(parser.parse_args().folder)
    rows, load = [], os.getloadavg()[0]
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        version = browser.version
        for count, clusters in SIZES.items():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(repeated(images, count), clusters, browser, Path(folder)))
            print(rows[-1], flush=True)
        browser.close()
    rows = [{k: round(v, 2) for k, v in row.items()} for row in rows]
    print(pd.DataFrame(rows).to_string(index=False))
    conditions = {"cores": os.cpu_count(), "chromium": version, "rounds": ROUNDS,
                  "load_before": round(load, 1), "images": len(images)}  # fmt: skip
    write_json(RESULTS, {"rows": rows, "conditions": conditions})


if __name__ == "__main__":
    main()
