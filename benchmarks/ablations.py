"""Claim: of five values of beta the 0.6 of ``fast`` has the highest accuracy on the digits.

Trains the recipe ``fast`` with one setting changed at a time (:data:`SWEEPS`), over seeds, and
writes one row a run to results/ablations.csv as it comes. Rows that are there are skipped, so an
interrupted or stopped command goes on where it was:

    python benchmarks/ablations.py
    python benchmarks/ablations.py --features cifar10-jpeg/efficientnet_lite0=FILE.npz --paper

The digits are always among the data; ``--features NAME/BACKBONE=FILE.npz`` adds embeddings that are
there (``X`` [N, D] and the classes ``y`` [N]), ``--images NAME=FOLDER`` a folder with a sub-folder
for each class, as EfficientNet-Lite0 at 112 pixels embeds it and, for comparison, as 32 x 32
pixels.

Every fifth image is held out from each training. The scores are those of all images; ``acc``,
``nmi``, ``anmi`` and ``ari`` are of the vote, or of k-means. Classes score and do nothing else. No
class is read for ``information``: mutual information between neighbours over log K, on the held-out
images and the ten nearest among them (centred + L2), with probabilities at temperature 0.1 whatever
the training's; ``information_of_labels``, the same of the reported labels instead of probabilities;
``agreement`` of the heads; ``silhouette`` of a sample; ``learnability`` of the labels
(``temi.learnability``); ``balance``, the entropy of the marginals over log K; ``loss`` of the
lowest-loss head; ``stability``, the mean ARI between the seeds of one setting, whose labels are
kept in data/ablations.

A row counts as there while its resolved settings, its embeddings (``fingerprint``) and the code
(``code``) are the same. The latter is a hash of :data:`CODE`, without words and mere checks: the
mathematics of labels and scores, not what hands rows and neighbours to it, nor ``temi.config``, as
its outcome is in ``settings``. Code that was rearranged, and computes the same, need not cost
hours: ``--verify 3`` trains three rows of other code again, out of those that were trained on this
``--device``, on as many threads as they were, and only if every score comes out as it stands there,
all rows of that code count for the present one.

On a GPU (``--device cuda``) a row takes seconds. Its random numbers are those of a CPU, but not its
rounding, so that it scores as another draw does.
"""

import argparse
import ast
import dataclasses
import fnmatch
import hashlib
import inspect
import itertools
import json
import os
import random
import sys
import textwrap
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import temi
from benchmarks.table import alike
from temi import embeddings, ensemble, heads, losses, metrics, neighbors, state, steps, training
from temi.devices import device_name
from temi.embeddings import Features
from temi.files import home, write_whole
from temi.metrics import SCORES
from temi.results import run_settings
from temi.trouble import DivergenceError

RESULTS = Path(__file__).parents[1] / "results"
SWEEPS = {
    "recipe": ("fast", "paper"),
    "beta": (0.5, 0.6, 0.7, 0.8, 1.0),
    "num_clusters": (0.5, 1, 2, 5),  # times the number of classes
    "num_heads": (1, 4, 8, 16, 32),
    "num_neighbors": (5, 10, 25, 50, 100),
    "teacher_momentum": (0.5, 0.8, 0.9, 0.99, 0.996),
    "loss": ("temi", "wmi", "pmi", "scan"),
    "normalize": ("none", "l2", "center-l2"),
    "learning_rate": (1e-3, 2e-3, 4e-3, 8e-3),
    "student_temp": (0.05, 0.07, 0.1, 0.2),
    "teacher_temp": (0.05, 0.07, 0.1, 0.2),
    "pca_dim": (16, 32, 64, 128, 512, 10**6),  # the last: all
}
BASE = {"device": "cpu", "precision": "fp32"}
BASELINES = ("none", "center-l2")
SHORT = 5000  # images; with more, a training of 100 epochs takes over five minutes on two cores
IDENTITY = ["dataset", "backbone", "method", "setting", "value", "seed"]
KEY = ["settings", "fingerprint", "code"]
SCORING = (
    metrics.evaluate, metrics.cluster_accuracy, metrics.neighbor_information, metrics.silhouette,
    metrics.learnability, neighbors.nearest_neighbors, embeddings.normalize,
    embeddings.mean_embedding,
)  # fmt: skip
CODE = {
    "kmeans": (temi.kmeans, *SCORING),
    "temi": (
        losses, heads, steps, state, training.train, training.run_epoch, embeddings.principal_axes,
        ensemble.align_heads, ensemble.relabel, ensemble.vote, ensemble.mean_probs,
        ensemble.head_labels, *SCORING,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A row to come: ``config`` is None for k-means, which is told from ``method``."""

    row: dict
    features: Features
    config: temi.TrainConfig | None

    @property
    def label(self) -> str:
        return label(self.row)


def label(row: dict) -> str:
    """A row's name, which ``--only`` takes."""
    return "{dataset}/{backbone}/{method}/{setting}={value}/{seed}".format(**row)


def code_version(parts: tuple) -> str:
    """Hash of modules and functions without docstrings, comments, empty lines and mere checks.

    Those are an ``if`` that only raises and a call of ``check_...`` on its own: they decide whether
    there is a row, not what stands in it. As little does one of ``show_...``.
    """
    digest = hashlib.sha256()
    for part in parts:
        source = textwrap.dedent(inspect.getsource(part))
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and ast.get_docstring(node) is not None:
                node = node.body[0]
            elif not is_check(node):
                continue
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        kept = [line.split("  # ")[0].rstrip() for line in lines]
        kept = [line for line in kept if line and not line.lstrip().startswith("#")]
        digest.update("\n".join(kept).encode())
    return digest.hexdigest()[:12]


def is_check(node: ast.AST) -> bool:
    """Whether a statement can do nothing but raise, or show something."""
    match node:
        case ast.If(body=[ast.Raise()], orelse=[]):
            return True
        case ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name))):
            return name.startswith(("check_", "show_"))
    return False


def changes(features: Features, paper: bool) -> list[tuple[str, object, dict]]:
    """What is trained on embeddings: setting, its value, and what is other than in the base."""
    classes, width = features.num_classes, features.x.shape[1]
    base = vars(temi.TrainConfig(**BASE)) | {"num_clusters": classes}
    base["pca_dim"] = min(base["pca_dim"], width)
    chosen = []
    for setting, values in SWEEPS.items():
        if setting == "num_clusters":
            values = [max(2, round(value * classes)) for value in values]
        if setting == "pca_dim":
            values = dict.fromkeys(min(value, width) for value in values)
        for value in values:
            too_long = value == "paper" and len(features) > SHORT and not paper
            if (value != base[setting] or setting == "recipe") and not too_long:
                chosen.append((setting, value, {setting: value}))
    return chosen


def jobs_on(group: list[Features], seeds: int, paper: bool, device: str) -> list[Job]:
    """All rows of a data set; of its backbones but the first, the base alone."""
    jobs, code = [], {method: code_version(parts) for method, parts in CODE.items()}
    for features in group:
        first = features is group[0]
        chosen = changes(features, paper) if first else [("backbone", features.backbone, {})]
        names = {"dataset": features.dataset, "backbone": features.backbone}
        names["classes"] = features.num_classes
        names["fingerprint"] = features.manifest["sha256"][:12]
        for seed in range(seeds):
            counts = set()
            for setting, value, change in chosen:
                given = {"num_clusters": features.num_classes, "seed": seed, "device": device}
                config = temi.TrainConfig(**BASE | given | change)
                config = config.resolve(len(training_rows(features)))
                counts.add(config.num_clusters)
                settings = run_settings(features.dataset, features.backbone, config)
                del settings["device"], settings["seed"]
                row = {"method": "temi", "setting": setting, "value": value, "seed": seed}
                row["settings"] = json.dumps(settings, separators=(",", ":"))
                jobs.append(Job(names | row | {"code": code["temi"]}, features, config))
            for how, count in itertools.product(BASELINES, sorted(counts)):
                row = {"method": f"kmeans-{how}", "setting": "num_clusters", "value": count}
                row |= {"seed": seed, "settings": json.dumps({"num_clusters": count})}
                jobs.append(Job(names | row | {"code": code["kmeans"]}, features, None))
    # one seed of everything, k-means first, says more than all seeds of a few settings
    return sorted(jobs, key=lambda job: (job.row["seed"] > 0, job.config is not None))


def training_rows(features: Features) -> np.ndarray:
    """Images that are trained on: four of five."""
    return np.flatnonzero(np.arange(len(features)) % 5)


def measure(job: Job) -> tuple[dict, np.ndarray | None]:
    """Train once; the row, and the labels of all images (None after a collapse)."""
    features, clock = job.features, time.perf_counter()
    x, classes = features.x, features.labels
    held = np.setdiff1d(np.arange(len(x)), training_rows(features))
    if job.config is None:
        count, how = job.row["value"], job.row["method"].removeprefix("kmeans-")
        labels = temi.kmeans(x, count, how, job.row["seed"])
        seconds, probs, found = time.perf_counter() - clock, labels[held], {}
    else:
        try:
            run = temi.train(x[training_rows(features)], job.config, progress=False)
        except DivergenceError as error:
            return job.row | {"failed": str(error)} | conditions(job), None
        seconds, count = sum(run.seconds.values()), run.config.num_clusters
        of_heads = run.predict_heads(x)
        labels, agreement = temi.vote(of_heads, count, run.best_head)
        alike = dataclasses.replace(run, config=dataclasses.replace(run.config, teacher_temp=0.1))
        probs = alike.predict_proba(x[held])
        scores = pd.DataFrame([temi.evaluate(each, classes) for each in of_heads])
        found = prefixed("soft", temi.evaluate(run.soft_consensus(x)[0], classes))
        found |= prefixed("mean_head", scores.mean())
        found |= prefixed("best_head", scores.iloc[run.best_head])
        found |= {"agreement": agreement.mean(), "loss": run.head_losses.min()}
        found["balance"] = run.history[-1]["marginal_entropy"] / np.log(count)
    prepared = embeddings.normalize(x, "center-l2")
    nearest, _ = temi.nearest_neighbors(torch.from_numpy(prepared[held]), 10)
    information = temi.neighbor_information(probs, nearest.numpy())
    found["information"] = information / np.log(count)
    information = temi.neighbor_information(labels[held], nearest.numpy())
    found["information_of_labels"] = information / np.log(count)
    if len(np.unique(labels)) > 1:
        found["silhouette"] = temi.silhouette(prepared, labels)
        found["learnability"] = temi.learnability(prepared, labels)
    found = temi.evaluate(labels, classes) | found
    row = {name: round(float(value), 4) for name, value in found.items()}
    return job.row | row | {"seconds": round(seconds, 1)} | conditions(job), labels


def conditions(job: Job) -> dict:
    return {"threads": torch.get_num_threads(), "device": device_of(job.config)}


def device_of(config: temi.TrainConfig | None) -> str:
    return "cpu" if config is None else device_name(torch.device(config.device))


def prefixed(name: str, scores: dict) -> dict:
    return {f"{name}_{score}": scores[score] for score in SCORES}


COLUMNS = [
    *IDENTITY, "classes", *SCORES, *(f"{who}_{score}" for who in ("soft", "mean_head", "best_head")
                          for score in SCORES),
    "information", "information_of_labels", "agreement", "silhouette", "learnability", "balance",
    "loss", "stability", "seconds", "threads", "device", "failed", "fingerprint", "code", "command",
    "settings",
]  # fmt: skip


def read(file: Path) -> pd.DataFrame:
    """The rows that are there."""
    if not file.exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(file, dtype=dict.fromkeys(["value", "failed", "fingerprint", "code"], str))


def store(row: dict, labels: np.ndarray | None, file: Path, source: str) -> None:
    """Put a row in the place of its forerunner, if there is one; the file is written whole."""
    source += "--device cuda " if row["device"] != "cpu" else ""
    row = row | {"command": f"python benchmarks/ablations.py {source}--only {label(row)} --again"}
    table = read(file)
    rows = table[~alike(table, row, IDENTITY)].to_dict("records")
    table = pd.DataFrame([*rows, row], columns=COLUMNS)
    if labels is not None:
        cache(row).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(cache(row), labels=labels.astype(np.int16))
        seeds = alike(table, row, [name for name in IDENTITY + KEY if name != "seed"])
        files = [cache(each) for each in table[seeds].to_dict("records")]
        found = [np.load(each)["labels"] for each in files if each.exists()]
        if len(found) > 1:
            table.loc[seeds, "stability"] = round(temi.stability(found), 4)
    write_whole(file, table.to_csv(index=False))


def verify(jobs: list[Job], file: Path, number: int) -> None:
    """Let rows of other code count for the present one, if some, trained again, are the same."""
    table = read(file)
    others: dict[tuple, list[tuple[Job, dict]]] = {}
    for job in jobs:
        rows = table[alike(table, job.row, [*IDENTITY, "settings", "fingerprint"])]
        for row in rows[rows["code"] != job.row["code"]].to_dict("records"):
            others.setdefault((row["method"], row["code"]), []).append((job, row))
    for (method, code), found in others.items():
        here = [(job, row) for job, row in found if row["device"] == device_of(job.config)]
        if not here:
            print(f"{len(found)} rows of {method} were all trained on another --device")
            continue
        for job, row in random.Random(0).sample(here, min(number, len(here))):
            torch.set_num_threads(int(row["threads"]))
            again, _ = measure(job)
            names = set(again) - {*KEY, "seconds", "threads"}
            differ = [name for name in names if str(again[name]) != str(row[name])]
            if differ:
                print(f"{job.label} differs in {', '.join(sorted(differ))}: rows of {code} are old")
                break
        else:
            for job, row in found:
                if cache(row).exists():
                    cache(row).rename(cache(row | job.row))
                table.loc[alike(table, row, IDENTITY), "code"] = job.row["code"]
            write_whole(file, table.to_csv(index=False))
            print(f"{len(found)} rows of {method} hold for the present code too")


def cache(row: dict) -> Path:
    """Where a row's labels are kept."""
    text = "\n".join(str(row[name]) for name in IDENTITY + KEY)
    return home() / "data" / "ablations" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


def named(features: Features, dataset: str, backbone: str) -> Features:
    """Embeddings with names that say nothing about where their file is."""
    manifest = features.manifest | {"dataset": dataset, "backbone": backbone}
    return dataclasses.replace(features, manifest=manifest)


def load(arguments: argparse.Namespace) -> list[list[Features]]:
    """Embeddings of each data set, those of its main backbone first."""
    digits = temi.load_images("digits")
    by_network = temi.embed(digits, "efficientnet_lite0", image_size=112, precision="fp32")
    groups = [[temi.embed(digits, "pixels"), by_network]]
    for name, file in arguments.features:
        dataset, _, backbone = name.partition("/")
        groups.append([named(temi.load_features(file), dataset, backbone or "own")])
    for name, folder in arguments.images:
        images = temi.load_images(folder, labels="folders")
        spaces = {"efficientnet_lite0": 112, "pixels": 32}
        embedded = {backbone: temi.embed(images, backbone, image_size=size, precision="fp32")
                    for backbone, size in spaces.items()}  # fmt: skip
        groups.append([named(features, name, space) for space, features in embedded.items()])
    return groups


def pair(text: str) -> list[str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=PATH is needed")
    return [name, path]


def announced(jobs: list[Job], bar: tqdm, end: float):
    """The jobs one by one, each shown when it starts, until the time is over."""
    for job in jobs:
        if time.monotonic() > end:
            return
        bar.set_postfix_str(job.label)
        yield joblib.delayed(measure)(job)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    source = {"type": pair, "action": "append", "default": []}
    option("--features", **source, metavar="NAME/BACKBONE=FILE", help=".npz with X and y")
    option("--images", **source, metavar="NAME=FOLDER", help="of a sub-folder for each class")
    option("--seeds", type=int, default=3)
    option("--paper", action="store_true", help=f"recipe paper on over {SHORT} images too")
    option("--device", default="cpu", help="of the trainings; k-means and scores: the CPU")
    option("--only", default="*", help="rows whose name fits, as 'digits/*/beta=*/0'")
    option("--again", action="store_true", help="also what is there")
    option("--verify", type=int, metavar="N", help="see whether rows of other code still hold")
    cores = os.cpu_count() or 1
    option("--jobs", type=int, default=max(1, cores // 4), help="runs at a time: one to four cores")
    option("--max-minutes", type=float, default=float("inf"), help="then no further run starts")
    option("--out", type=Path, default=RESULTS / "ablations.csv")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    end = time.monotonic() + 60 * options.max_minutes
    jobs = [job for group in load(options)
            for job in jobs_on(group, options.seeds, options.paper, options.device)
            if fnmatch.fnmatch(job.label, options.only)]  # fmt: skip
    if not jobs:
        raise SystemExit(f"--only {options.only}: no row fits; names are as "
                         "digits/pixels/temi/beta=0.7/0, a star stands for anything")  # fmt: skip
    if options.verify:
        verify(jobs, options.out, options.verify)
    table = read(options.out)
    missing = [job for job in jobs
               if options.again or not alike(table, job.row, IDENTITY + KEY).any()]  # fmt: skip
    print(f"{len(jobs) - len(missing)} of {len(jobs)} rows are there in {options.out.name}")
    if not options.features and not options.images:
        print("other data: --features NAME/BACKBONE=FILE.npz, --images NAME=FOLDER")
    if not missing:
        return
    sources = {name.split("/")[0]: f"--features {name}=FILE.npz " for name, _ in options.features}
    sources |= {name: f"--images {name}=FOLDER " for name, _ in options.images}
    with tqdm(total=len(missing), unit="run", file=sys.stdout) as bar:
        parallel = joblib.Parallel(
            options.jobs, return_as="generator_unordered", pre_dispatch=options.jobs
        )
        for row, labels in parallel(announced(missing, bar, end)):
            store(row, labels, options.out, sources.get(row["dataset"], ""))
            bar.update()


if __name__ == "__main__":
    main()
