"""What is written while a run grows, and when."""

import shutil
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor
from tqdm import tqdm

from temi import checkpoints
from temi.config import RunOptions
from temi.data import ImageSet
from temi.embeddings import Features
from temi.files import RESULTS, SETTINGS, whole_file, write_json
from temi.image_files import UnreadableImageError
from temi.results import best_epoch, final_results
from temi.rundirs import Place, locked, settle, stage
from temi.runs import Run

LOGS = "logs"
SAVE_SECONDS = 10.0  # what a killed training loses at most, beside the epoch that it was in
ROWS = 2**16  # of a table written together: as texts they take many times the memory


class Record:
    """Keeps a run that grows, in the folder of its :class:`temi.rundirs.Place`.

    Within this context checkpoints are written by a thread of their own, from states that nothing
    changes any more; the next one waits for the one before; and no other process may train there.
    Where the place is None, nothing is written.

    Parameters
    ----------
    place : Place
    settings : dict
        From :func:`temi.results.run_settings`.
    options : RunOptions
    resumed : (Path, dict), optional
        Checkpoint that the run goes on from.
    """

    def __init__(
        self,
        place: Place,
        settings: dict,
        options: RunOptions,
        resumed: tuple[Path, dict] | None = None,
    ):
        self.place, self.options, self.folder = place, options, place.folder
        self.pool, self.pending = ThreadPoolExecutor(max_workers=1), Future()
        self.pending.set_result(None)
        self._writer: Any = None
        self._saved = -SAVE_SECONDS  # when a checkpoint was last begun
        self._best: dict | None = None  # state of the best epoch, if that is newer
        self._bar, self._per_epoch = tqdm(disable=True), 1
        self._lock = ExitStack()
        self._neighbors = resumed[1].get("neighbors") if resumed else None
        if self.folder is None:
            return
        self.checkpoints = self.folder / checkpoints.FOLDER
        with ExitStack() as unless_begun:
            unless_begun.enter_context(locked(place.run_dir))
            self._open(settings, *resumed or (None, None))
            self._lock = unless_begun.pop_all()

    def _open(self, settings: dict, path: Path | None, content: dict | None) -> None:
        """A folder with settings and the checkpoint that the run goes on from."""
        if path is None or self.folder not in path.parents:
            self._begin(path, settings)
        write_json(self.folder / SETTINGS, settings)
        self.checkpoints.mkdir(exist_ok=True)
        if path is not None:
            if path.name != checkpoints.LATEST:
                checkpoints.link(path, self.checkpoints / checkpoints.LATEST)
            if content["step"] == 0 and content["history"]:
                self._keep(content)  # a kill may have come between the file and its other names

    def _begin(self, source: Path | None, settings: dict) -> None:
        """A new folder, with what a run before this one leaves it."""
        expected = self.options.overwrite or self.place.source is not None
        if not expected and stage(self.folder):  # find_place saw none, maybe hours ago
            raise ValueError(
                f"run_dir={str(self.place.run_dir)!r}: another process has begun a run there "
                "meanwhile; give another run_dir, or resume='auto' once it has stopped"
            )
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        if source is None:
            return
        carried = self.folder / f"{checkpoints.FOLDER}.part"
        carried.mkdir()
        for path in {*checkpoints.up_to(source), source}:
            checkpoints.link(path, carried / path.name)
        write_json(self.folder / SETTINGS, settings)
        carried.rename(self.checkpoints)
        if (logs := source.parent.with_name(LOGS)).is_dir():
            shutil.copytree(logs, self.folder / LOGS)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind, error, _) -> None:
        with self._lock:
            self.close(quietly=error is not None)

    def close(self, quietly: bool = False) -> None:
        """Finish what is being written; fail if that failed, unless ``quietly``."""
        self.pool.shutdown(wait=True)
        if self._writer is not None:
            self._writer.close()
        if not quietly:
            self.pending.result()

    @property
    def writer(self):
        """TensorBoard's writer, imported when first used."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.folder / LOGS)
        return self._writer

    def show_steps(self, bar: tqdm, per_epoch: int) -> None:
        """Let a bar over epochs move with every step that is logged from here on."""
        self._bar, self._per_epoch = bar, per_epoch

    def log_step(self, number: int, losses: Tensor, gradient_norm: Tensor, rate: float) -> None:
        """Log a step (from 0) now and then."""
        self._bar.n = round((number + 1) / self._per_epoch, 2)
        self._bar.update(0)
        if self.folder is not None:
            for name, value in (
                ("loss", losses.mean()), ("gradient norm", gradient_norm), ("learning rate", rate)
            ):  # fmt: skip
                self.writer.add_scalar(f"step/{name}", float(value), number)

    def epoch(self, content: dict, run: Run, features: Features, sizes: Tensor) -> None:
        """Write all that is valid after an epoch.

        A checkpoint is written after the first epoch and the last, after those whose checkpoints
        stay, and after others that end :data:`SAVE_SECONDS` after the one before or later.

        Parameters
        ----------
        content : dict
            Of the checkpoint; nothing may change it from here on.
        run : Run
            As it stands.
        features : Features
        sizes : Tensor [H, K]
            Images in each cluster of each head.
        """
        self._bar.n = content["epoch"]  # a whole number again
        if self.folder is None:
            return
        number, now, options = content["epoch"], time.monotonic(), self.options
        if best_epoch(content["history"], options.best_by)[0] == number:
            self._best = content
        stays = number % options.checkpoint_every == 0 or number == run.config.epochs
        if stays or now - self._saved >= SAVE_SECONDS:
            self.pending.result()
            self.pending = self.pool.submit(self._save, content, self._best)
            self._saved, self._best = now, None
        self._neighbors = content["neighbors"]
        self._write(run, features, finished=False)
        entry = run.history[-1]
        for head, loss in enumerate(entry["head_losses"]):
            self.writer.add_scalar(f"loss/head {head:02d}", loss, number)
        names = ("learning_rate", "marginal_entropy", "gradient_norm", "mean_head_acc",
                 "best_head_acc", "ensemble_acc")  # fmt: skip
        for name in names:
            if name in entry:
                self.writer.add_scalar(f"epoch/{name}", entry[name], number)
        self.writer.add_histogram("cluster sizes", sizes.flatten(), number)
        self.writer.flush()

    def _save(self, content: dict, best: dict | None) -> None:
        if best is not content:
            self._save_best(best)
        checkpoints.save_latest(self.checkpoints, content, position(content))
        self._keep(content)

    def _save_best(self, content: dict | None) -> None:
        if content is not None:
            checkpoints.save(self.checkpoints / checkpoints.BEST, content, position(content))

    def _keep(self, content: dict) -> None:
        epoch, options = content["epoch"], self.options
        best = best_epoch(content["history"], options.best_by)[0] == epoch
        checkpoints.keep_latest(
            self.checkpoints, epoch, best, options.checkpoint_every, options.keep_checkpoints
        )

    def emergency(self, state: Callable[..., dict], *arguments) -> None:
        """Save ``state(*arguments)``, the last complete step of a training that is cut short."""
        if self.folder is None:
            return
        self.pending.result()
        content = state(*arguments)
        self._save_best(self._best)
        checkpoints.save(self.checkpoints / checkpoints.EMERGENCY, content, position(content))
        tqdm.write(
            f"stopped after {content['epoch']} epochs and {content['step']} steps; "
            f"resume='auto' goes on from {checkpoints.EMERGENCY}",
            file=sys.stdout,
        )

    def finish(self, run: Run, features: Features, images: ImageSet | None) -> None:
        """Write what a finished run has, and put it where it shall stand."""
        if self.folder is None:
            return
        self.pending.result()
        if images is not None:
            from temi.plots import cluster_rows

            if len(images) > len(features):  # some could not be read
                images = images.keep(features.ids)
            try:
                figure = cluster_rows(images.images, run.labels, run.agreement)
            except (UnreadableImageError, OSError) as error:  # it could be read before the training
                warnings.warn(f"clusters.png is left out, as an image is: {error}", stacklevel=3)
            else:
                with whole_file(self.folder / "clusters.png") as file:
                    figure.savefig(file, format="png")
                self.writer.add_figure("clusters", figure, len(run.history))
        self._write(run, features, finished=True)
        self.close()
        settle(self.place.run_dir)

    def _write(self, run: Run, features: Features, finished: bool) -> None:
        with whole_file(self.folder / "assignments.csv") as file:
            for start in range(0, len(features), ROWS):
                part = slice(start, start + ROWS)
                table = {"path": features.ids[part], "cluster": run.labels[part]}
                table |= {"agreement": run.agreement[part]}
                rows = pd.DataFrame(table)
                rows.to_csv(file, index=False, header=start == 0, lineterminator="\n")
        results = final_results(
            run, features, best_by=self.options.best_by, finished=finished,
            neighbors=self._neighbors, baseline=self.options.baseline,
        )  # fmt: skip
        if finished:
            self._log_scores(results)
        write_json(self.folder / RESULTS, results)

    def _log_scores(self, results: dict) -> None:
        """Settings with final scores, for TensorBoard's comparison of runs."""
        settings = {key: value if isinstance(value, (int, float)) else _as_utf8(str(value))
                    for key, value in results["config"].items()}  # fmt: skip
        scores = {f"final/{name}": value
                  for name, value in results["metrics"].items() if value is not None}  # fmt: skip
        scores["final/loss"] = results["best_head"]["loss"]
        self.writer.add_hparams(settings, scores, run_name=".", global_step=len(results["history"]))


def _as_utf8(text: str) -> str:
    """A path of any bytes as TensorBoard can write it."""
    return text.encode(errors="backslashreplace").decode()


def position(content: dict) -> checkpoints.Position:
    """Position in the training of a checkpoint's content."""
    return checkpoints.Position(len(content["retries"]), content["epoch"], content["step"])
