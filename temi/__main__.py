"""The command line, ``python -m temi``; its options are the fields of the settings' classes."""

import contextlib
import dataclasses
import io
import json
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSubCommand,
    SettingsConfigDict,
    get_subcommand,
)

from temi import checkpoints, distributed
from temi.config import RECIPES, TrainConfig
from temi.data import holds_embeddings
from temi.devices import is_out_of_memory
from temi.extraction import ExtractionConfig
from temi.files import (
    RESULTS,
    SETTINGS,
    absolute,
    check_writable,
    expanded,
    read_json,
    readable_path,
)
from temi.parameters import JobConfig

if TYPE_CHECKING:
    import temi

SOURCE = ("split", "backbone", "image_size", "weights", "data_dir", "force_recompute")


def options(cls: type, *names: str, without: tuple[str, ...] = (), **defaults) -> dict[str, Any]:
    """Fields of a settings class as those of a model.

    Limits are left to the class itself, whose messages have one line. ``names`` are the fields
    that are taken, all when none is named; ``defaults`` replace those of the class.
    """
    found = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if (names and name not in names) or name in without:
            continue
        kind, text = hint, None
        if get_origin(hint) is Annotated:
            kind, info = get_args(hint)
            text = info.description
        if name in RECIPES["fast"] and cls is TrainConfig:
            kind, text = kind | None, f"{text}; None: {RECIPES['fast'][name]} with the recipe fast"
        if Path in get_args(kind):  # text names a path on the command line
            kind = str | None
        default = defaults.get(name, getattr(cls, name))
        found[name] = (kind, Field(default, description=text))
    return found


def field(cls: type, name: str) -> Any:
    """One field of a settings class."""
    return options(cls, name)[name][1]


Source = create_model("Source", **options(JobConfig, *SOURCE))
Training = create_model(
    "Training",
    **options(TrainConfig),
    **options(JobConfig, without=("dataset", "run_dir", *SOURCE)),
)
Summary = create_model(
    "Summary", json_summary=(bool, Field(False, description="print a summary in JSON, no more"))
)


class Cluster(Summary, Training, create_model("Photos", **options(
    JobConfig, *SOURCE, backbone="efficientnet_lite0"
))):  # fmt: skip
    """Group the images of a folder: embed, train, and write a table, a gallery and the run."""

    folder: CliPositionalArg[str] = Field(description="folder of images, or name of a data set")
    num_clusters: int | None = Field(
        None,
        description="clusters K; None: the images suggest a number; sensible: 2 to some thousand",
    )
    out: str = Field("clusters", description="folder for all that is written")
    sort: Literal["copy", "hardlink", "symlink"] | None = Field(
        None, description="also a folder for each cluster, with copies of the images or links"
    )
    map: bool = Field(True, description="a map of all images in the gallery (t-SNE)")

    def work(self) -> dict:
        import temi
        from temi.export import check_replaceable, check_sortable
        from temi.selection import default_candidates

        if holds_embeddings(self.folder):
            raise ValueError(
                f"folder={self.folder!r}: holds embeddings; 'python -m temi train' takes those"
            )
        out, folder = absolute(expanded(self.out)), readable_path(self.folder).resolve()
        if folder.is_dir() and out.resolve().is_relative_to(folder):
            raise ValueError(
                f"out={self.out!r}: lies among the images, and would be taken for some of them; "
                "give --out a folder elsewhere"
            )
        job = _settings(self, JobConfig, dataset=self.folder, run_dir=str(out / "run"))
        config = _settings(self, TrainConfig)
        distributed.from_first(partial(check_writable, "out", out))
        if self.sort:
            check_replaceable(out / "sorted")
        images = distributed.first_ahead(job.load)
        if self.sort:
            check_sortable(images, self.sort)
        features = None
        if config.num_clusters is None:  # the number of classes is nothing that images know
            default_candidates(len(images))
            dataclasses.replace(config, num_clusters=2).resolve(len(images))  # the other settings
            features = job.embed(images, config)
            suggest = partial(temi.suggest_num_clusters, features, seed=config.seed)
            number = distributed.from_first(suggest).num_clusters
            print(f"num_clusters={number} is suggested by the images themselves")
            config = dataclasses.replace(config, num_clusters=number)
        config, run_dir = distributed.from_first(partial(temi.plan_run, job, config, images))
        features = features or job.embed(images, config)
        run = temi.train(features, config, images=images, run_dir=run_dir, **job.options)
        return distributed.from_first(partial(self.write, run, images, features, out))

    def write(
        self, run: "temi.Run", images: "temi.ImageSet", features: "temi.Features", out: Path
    ) -> dict:
        """Table, gallery and sorted folders of a run; a summary."""
        import temi

        shown = images.keep(features.ids)
        table = temi.assignments(run, features)
        temi.write_assignments(table, out)
        points = None
        if self.map:
            print("laying out the map of all images (t-SNE; --no-map leaves it out)", flush=True)
            points = temi.map_points(run.inputs(features).numpy())
        temi.write_gallery(
            out / "gallery.html", table, shown, title=readable_path(self.folder).name, points=points
        )
        if self.sort:
            temi.sort_images(table, shown, out / "sorted", how=self.sort)
        return {
            "images": len(features),
            "unreadable": len(images) - len(features),
            "clusters": run.config.num_clusters,
            "sizes": temi.cluster_statistics(run.labels, run.config.num_clusters)["sizes"],
            "mean_agreement": round(float(run.agreement.mean()), 4),
            "files": sorted(str(path) for path in out.iterdir()),
        }


class Predict(Summary):
    """Sort new images into the clusters of a run."""

    run: CliPositionalArg[str] = Field(description="run directory, or a folder that cluster made")
    folder: CliPositionalArg[str] = Field(description="folder of new images, or a data set")
    out: str = Field("predicted", description="folder for the tables")
    split: str | None = field(JobConfig, "split")
    weights: str | None = Field(None, description="the backbone's weights; None: where they were")
    data_dir: str = field(JobConfig, "data_dir")
    device: str = field(TrainConfig, "device")

    def work(self) -> dict:
        import temi

        run = Path(self.run) / "run" if readable_path(Path(self.run) / "run").is_dir() else self.run
        out = absolute(expanded(self.out))
        within_run = any(
            (place / SETTINGS).exists()
            and ((place / RESULTS).exists() or (place / checkpoints.FOLDER).exists())
            for place in (out, *out.resolve().parents)
        )
        if within_run or (out / "run").is_dir():
            raise ValueError(
                f"out={self.out!r}: holds a run and the tables of its own images; give --out "
                "another folder"
            )
        trained = temi.load_run(run)
        distributed.from_first(partial(check_writable, "out", out))
        load = partial(temi.load_images, self.folder, split=self.split, data_dir=self.data_dir)
        images = distributed.first_ahead(load)
        table = trained.predict(
            images, weights=self.weights, data_dir=self.data_dir, device=self.device
        )
        distributed.from_first(partial(temi.write_assignments, table, out))
        outliers = table["outlier"].sum() if table["outlier"].notna().all() else None
        return {
            "images": len(table),
            "unreadable": len(images) - len(table),
            "sizes": table["cluster"].value_counts().sort_index().to_dict(),
            "outliers": None if outliers is None else int(outliers),
            "files": sorted(str(path) for path in out.iterdir()),
        }


class Train(Summary, Training, Source):
    """Train on a data set, a folder or a file of embeddings, and keep the run."""

    dataset: CliPositionalArg[str] = Field(description=field(JobConfig, "dataset").description)
    run_dir: str | None = field(JobConfig, "run_dir")

    def work(self) -> dict:
        import temi

        job, config = _settings(self, JobConfig), _settings(self, TrainConfig)
        data = distributed.first_ahead(job.load)
        config, run_dir = distributed.from_first(partial(temi.plan_run, job, config, data))
        images = data if isinstance(data, temi.ImageSet) else None
        features = job.embed(data, config)
        temi.train(features, config, images=images, run_dir=run_dir, **job.options)
        results = read_json(run_dir / RESULTS)
        return {
            "metrics": results["metrics"],
            "kmeans": results["kmeans"],
            "cluster_statistics": results["cluster_statistics"],
            "mean_agreement": results["ensemble"]["mean_agreement"],
            "files": sorted(str(path) for path in run_dir.iterdir()),
        }


class Embed(Summary, create_model("Extraction", **options(
    ExtractionConfig, without=("progress",)
)), Source):  # fmt: skip
    """Embed a data set or a folder with a backbone, into the cache.

    Several processes share the work under torchrun, or each takes a --shard.
    """

    dataset: CliPositionalArg[str] = Field(description="data set, or folder of images")

    def work(self) -> dict:
        import temi

        load = partial(temi.load_images, self.dataset, split=self.split, data_dir=self.data_dir)
        images = distributed.first_ahead(load)
        given = self.model_dump(exclude={"dataset", "split", "shard", "json_summary"})
        if self.shard is not None:
            missing = temi.embed_shard(images, shard=self.shard, **given)
            return {"images": len(images), "shard": self.shard, "missing": missing}
        features = temi.embed(images, **given)
        manifest = features.manifest
        return {
            "images": len(features),
            "unreadable": len(images) - len(features),
            "shape": list(features.x.shape),
            "dtype": str(features.x.dtype),
            "backbone": manifest["backbone"],
            "data_dir": self.data_dir,
        }


class App(BaseSettings):
    """Group images without labels. Each command has its own --help."""

    model_config = SettingsConfigDict(
        cli_prog_name="python -m temi",
        cli_parse_none_str="None",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_enforce_required=True,
    )
    cluster: CliSubCommand[Cluster] = Field(description="group the images of a folder")
    predict: CliSubCommand[Predict] = Field(description="sort new images into those groups")
    train: CliSubCommand[Train] = Field(description="train on images or embeddings, keep the run")
    embed: CliSubCommand[Embed] = Field(description="compute and keep embeddings, no more")


def _settings(given: BaseModel, cls: type, **more):
    """A settings class with those of its fields that were given."""
    names = {own.name for own in dataclasses.fields(cls)} & set(type(given).model_fields)
    return cls(**{name: getattr(given, name) for name in names} | more)


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : list of str, optional
        None: those of the process.

    Returns
    -------
    int
        0; 1 after an error, which is said in one line; 2 where an option cannot be read, as a word
        for a number; 130 after Ctrl-C, when what was computed is kept.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path is no reason to fail, whatever the locale
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command: Any = get_subcommand(CliApp.run(App, cli_args=given))
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][1]).replace("_", "-")
        distributed.say(f"error: --{option} {first['input']!r}: {first['msg']}")
        return 2
    shown = sys.stderr if command.json_summary else sys.stdout
    try:
        with contextlib.redirect_stdout(shown), distributed.one_voice(), _plain_warnings():
            summary = command.work()
    except (
        ValueError, OSError, MemoryError, FloatingPointError, distributed.RankLostError
    ) as error:  # fmt: skip
        distributed.say(f"error: {error}")
        return 1
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        distributed.say(f"error: not enough memory: {error}")
        return 1
    except KeyboardInterrupt:
        resuming = " with --resume auto" if hasattr(command, "resume") else ""
        resuming += " instead of --overwrite" if getattr(command, "overwrite", False) else ""
        goes_on = f"the same command{resuming} goes on"
        if getattr(command, "force_recompute", False):
            goes_on += "; --force-recompute embeds all images once more"
        distributed.say(f"stopped; {goes_on}")
        return 130
    if distributed.is_first():
        print(json.dumps(summary, indent=2) if command.json_summary else _in_words(summary))
    return 0


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings in one line, without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(  # type: ignore[assignment]
            f"warning: {message}", file=sys.stderr
        )
        yield


def _in_words(summary: dict) -> str:
    """A summary for people: a line for each group of numbers, those that are known; the files."""
    lines = []
    for name, value in summary.items():
        if name == "files":
            lines += ["files:", *(f"  {path}" for path in value)]
        elif not isinstance(value, dict):
            lines += [f"{name}: {_rounded(value)}"]
        elif any(isinstance(each, dict) for each in value.values()):
            lines += [_in_words({f"{name}, {key}": each for key, each in value.items()})]
        else:
            known = [f"{k} {_rounded(v)}" for k, v in value.items() if v is not None]
            lines += [f"{name}: " + ", ".join(known)] if known else []
    return "\n".join(line for line in lines if line)


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
