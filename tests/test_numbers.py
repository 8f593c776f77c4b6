"""The numbers in the book's prose: computed in a cell beside them, or read from results/.

Decimals, percentages and numbers with a unit in a Markdown cell of a notebook must stand in the
code cells next to it, in their stored text outputs (which nbval holds to be true), or among the
settings of recipes and ablations. Those of the README must be what the test computes from results/.
What is neither, because nothing near it measures it, is listed in EXPLAINED with the reason.
"""

import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

import temi
from benchmarks.ablations import SWEEPS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
UNITS = {"%": 0.01, "s": 1, "ms": 1e-3, "MB": 1e6, "GB": 1e9, "images": 1, "pixels": 1, "nats": 1}
FENCED = re.compile(r"^(`{3,})(?!\{)[^\n]*\n.*?^\1", re.DOTALL | re.MULTILINE)
MARKUP = re.compile(r"\$\$[^$]*\$\$|\$[^$]*\$|^(?:`{3}|:)[^\n]*|`[^`]*`|\]\([^)]*\)", re.MULTILINE)
IN_PROSE = re.compile(rf"(?<![\w.,^-])(\d[\d,]*(?:\.\d+)?)(?:\s?({'|'.join(UNITS)})(?!\w))?")
ANY_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(%?)")

RUNS_IN = re.compile(r"runs in about (a minute|half a minute|\d+ s|\w+ minutes)")
EXPLAINED = {
    "*": {
        "112 pixels": "setting of the benchmarks on photographs",
        "144 pixels": "setting of the benchmarks on photographs",
        "224 pixels": "setting of the benchmarks on photographs",
        "10,000 images": "size of CIFAR-10's test part",
        "50,000 images": "size of CIFAR-10's training part",
        "60,000 images": "size of CIFAR-10",
        "169 MB": "size of a download, by CIFAR-100's page",
        "0.35 GB": "size of a download, DINOv2 ViT-B/14",
    },
    "01_data": {
        "32 pixels": "side of CIFAR-10's images",
        "1,797 images": "counted in an earlier cell",
    },
    "02_embeddings": {
        "183 images": "images of the commonest digit, checked in the cell after it",
        "0.25 ms": "decoding alone, which no benchmark here keeps",
    },
    "03_kmeans": {"0.833": "computed in an earlier cell"},
    "04_temi_loss": {"2.5": "of 128,000 images by 50,000"},
    "05_train": {"25,000 images": "size of Tiny-ImageNet-100"},
    "06_ablations": {"200 images": "four fifths of a class of Tiny-ImageNet-100"},
    "07_evaluation": {
        "0.504": "computed in an earlier cell",
        "95%": "the interval that was asked for",
        "89%": "of the paper that is linked",
    },
    "09_scaling": {"0.065": "computed in an earlier cell", "2.11": "version of torch"},
    "README": {
        "250,000 images": "EXACT_UP_TO of temi/neighbors.py",
        "3.10": "version of Python", "3.13": "version of Python",
        "0.671": "the paper's", "0.769": "the paper's",
        "67.1": "the paper's", "76.9": "the paper's", "53.3": "the paper's",
        "4.0": "version of a licence", "2.0": "version of a licence",
    },
}  # fmt: skip


def numbers_in_prose(markdown: str) -> list[tuple[str, str]]:
    """Numbers (as written, unit) that need a source: with a decimal point, or with a unit."""
    prose = MARKUP.sub(" ", FENCED.sub(" ", markdown))
    found = [(number.rstrip(","), unit or "") for number, unit in IN_PROSE.findall(prose)]
    return [(number, unit) for number, unit in found if unit or "." in number]


def values(text: str) -> np.ndarray:
    """All numbers of a text; percentages also as shares."""
    found = []
    for match in ANY_NUMBER.finditer(text):
        value = float(match.group().rstrip("%").replace(",", ""))
        found += [value, value / 100] if match.group(1) else [value]
    return np.array(found or [np.nan])


def unfounded(markdown: str, evidence: str, explained: dict[str, str]) -> list[str]:
    """The numbers of the prose that the evidence, rounded as they are, does not hold."""
    known, missing = values(evidence), []
    for number, unit in numbers_in_prose(markdown):
        value = float(number.replace(",", ""))
        near = 0.5 * 10.0 ** -len(number.partition(".")[2]) * (1 + 1e-6)
        scale = UNITS.get(unit, 1)
        same = [known, known / scale] + [known * 1e6 / scale] * (unit in ("MB", "GB"))
        written = f"{number} {unit}".strip() if unit != "%" else f"{number}%"
        if not any((np.abs(one - value) <= near).any() for one in same):
            missing += [] if {written, number} & set(explained) else [written]
    return missing


def told(path: Path) -> list[tuple[str, str]]:
    """Each Markdown cell of a notebook, and what founds it: the code cells near it, all settings.

    Those are the two before and the one after it, with their text outputs. The sentence that says
    what time the notebook takes is left to test_run_times.
    """
    texts, code = [], []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            texts.append((RUNS_IN.sub("", cell.source), len(code)))
            continue
        outputs = [output.get("text", "") for output in cell.outputs]
        outputs += [output.data.get("text/plain", "") for output in cell.outputs
                    if "data" in output and "image/png" not in output.data]  # fmt: skip
        code.append("\n".join([cell.source, *outputs]))
    settings = repr([temi.RECIPES, SWEEPS])
    return [(text, "\n".join([settings, *code[max(0, place - 2) : place + 1]]))
            for text, place in texts]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_of_chapters(path):
    explained = EXPLAINED["*"] | EXPLAINED.get(path.stem, {})
    assert [number for cell in told(path) for number in unfounded(*cell, explained)] == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("right 84% of the time", "right 38% of the time"), ("vote's 0.504 is", "vote's 0.604 is"),
     ("right 63% of the time", "right 36% of the time")],
)  # fmt: skip
def test_a_wrong_sentence_is_found(right, wrong):
    chapter = next(path for path in NOTEBOOKS if path.stem == "07_evaluation")
    ((text, known),) = [cell for cell in told(chapter) if right in cell[0]]
    assert unfounded(text.replace(right, wrong), known, EXPLAINED["*"])


def spread(column: pd.Series) -> str:
    return f"{column.mean().round(3):.3f} ± {column.std().round(3):.3f}"


def readme_rows(results: Path) -> dict[str, list[str]]:
    """How the rows of the README's table of scores begin, and their ACC and NMI."""
    scores = pd.read_csv(results / "digits_scores.csv").groupby("method")
    rows = {
        f"| digits | grey values | {name} |": [spread(scores.get_group(method)[score])
                                               for score in ("acc", "nmi")]
        for name, method in {"TEMI": "ensemble", "k-means": "kmeans none"}.items()
    }  # fmt: skip
    compared = pd.read_csv(results / "comparison.csv")
    compared = compared[compared["dataset"] == "cifar10-jpeg"].groupby("reading")
    network = "EfficientNet-Lite0, **trained with ImageNet's labels**"
    readings = {f"{network} | TEMI": "vote", "the same | k-means": "centred + L2"}
    for name, reading in readings.items():
        rows[f"| CIFAR-10 (JPEG) | {name} |"] = [
            spread(compared.get_group(reading)[score]) for score in ("acc", "nmi")
        ]
    others = pd.read_csv(results / "graph_clustering.csv").groupby(["dataset", "method"])
    for begins, dataset in {"digits | grey values": "digits",
                            "CIFAR-10 (JPEG) | the same": "cifar10-jpeg"}.items():  # fmt: skip
        cut = others.get_group((dataset, "spectral"))
        rows[f"| {begins} | spectral clustering |"] = [
            spread(cut[score]) for score in ("acc", "nmi")
        ]
    added = pd.read_csv(results / "beyond.csv")
    added = added[added["dataset"] == "cifar10-jpeg"].groupby("variant")
    twice = {"TEMI, recipe `best`": "two sizes, mutual neighbours", "k-means": "k-means, two sizes"}
    for name, variant in twice.items():
        rows[f"| CIFAR-10 (JPEG) | the same, at two sizes | {name} |"] = [
            spread(added.get_group(variant)[score]) for score in ("acc", "nmi")
        ]
    return rows


def wrong_rows(readme: str, results: Path) -> list[str]:
    lines = {f"{start} {' | '.join(scores)} |" for start, scores in readme_rows(results).items()}
    return sorted(lines - set(readme.splitlines()))


def test_numbers_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert wrong_rows(readme, ROOT / "results") == []
    computed = "\n".join(" ".join(scores) for scores in readme_rows(ROOT / "results").values())
    computed += f" {len(temi.load_images('digits'))} images"
    rows = json.loads((ROOT / "results/benchmarks/photographs.json").read_text())["rows"]
    for row in rows:
        computed += " {embed_s:.0f} s {cluster_s:.0f} s {cluster_mb} MB".format(**row)
    assert unfounded(readme, computed, EXPLAINED["*"] | EXPLAINED["README"]) == []


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("digits_scores.csv", "ensemble,2,0.882,", "ensemble,2,0.892,"),
        ("comparison.csv", "centred + L2,0.4559,", "centred + L2,0.4659,"),
        ("graph_clustering.csv", "digits,spectral,0,0.0,0.8854", "digits,spectral,0,0.0,0.8954"),
        ("beyond.csv", 'two sizes",0,0.4846', 'two sizes",0,0.4946'),
    ],
)
def test_a_changed_table_makes_the_readme_wrong(file, old, new, tmp_path):
    shutil.copytree(ROOT / "results", tmp_path, dirs_exist_ok=True)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    assert wrong_rows((ROOT / "README.md").read_text(), tmp_path)


def test_a_changed_output_makes_the_prose_wrong():
    told = (
        "Right are 59% or 0.588, after 2.5 s and with 1.6 GB (`0.1`, $0.2$, 3 seeds, 1,000 x 12)."
    )
    assert numbers_in_prose(told) == [("59", "%"), ("0.588", ""), ("2.5", "s"), ("1.6", "GB")]
    assert unfounded(told, "purity 0.5879, 2.47 s, 1613 MB", {}) == []
    assert unfounded(told, "purity 0.5899, 2.56 s, 1713 MB", {}) == ["0.588", "2.5 s", "1.6 GB"]
    assert unfounded(told, "", {"59%": "the paper's"}) == ["0.588", "2.5 s", "1.6 GB"]
