from dataclasses import asdict

import numpy as np
import pytest

from temi.config import RunOptions, TrainConfig
from temi.data import load_images
from temi.embeddings import Features
from temi.parameters import JobConfig, is_default, read_parameters

OWN = '# Parameters\ndataset: str = "digits"  # data set\nbeta: float = None\nnum_heads: int = None'


def notebook(*injected: str) -> dict:
    """Globals of a notebook after its parameters cell and papermill's own cells."""
    cells = ["", OWN, *injected, "import temi"]
    namespace = {"In": cells}
    for cell in cells[:-1]:
        exec(cell, namespace)
    return namespace


def test_parameters_of_the_notebook():
    job, config = read_parameters(notebook())
    assert (job.dataset, job.backbone, config.beta) == ("digits", "pixels", 0.6)


def test_injected_values_win():
    job, config = read_parameters(notebook("# Parameters\nbeta = 0.7\nnum_heads = 4\n"))
    assert (config.beta, config.num_heads) == (0.7, 4)
    assert job == JobConfig()


def test_other_names_in_the_notebook_do_not_matter():
    namespace = notebook()
    namespace |= {"batch_size": "something else", "bta": 3}
    assert read_parameters(namespace)[1].batch_size == 128


def test_a_runner_that_keeps_no_record_of_cells():
    """As nbval is; what is imported is no parameter, even where it is called like one."""
    namespace = {"In": [""], "dataset": "fashion-mnist", "beta": 0.7, "normalize": print}
    job, config = read_parameters(namespace)
    assert (job.dataset, config.beta, config.normalize) == ("fashion-mnist", 0.7, "center-l2")


def test_a_chapter_that_takes_no_folders_says_so_before_any_work(tmp_path):
    notebook_of = notebook(f"# Parameters\ndataset = {str(tmp_path)!r}\n")
    assert read_parameters(notebook_of)[0].dataset == str(tmp_path)
    with pytest.raises(ValueError, match=r"one of 'digits', .* 'stl10' is allowed in this chapter"):
        read_parameters(notebook_of, takes="arrays")
    assert read_parameters(notebook(), takes="arrays")[0].dataset == "digits"
    np.save(tmp_path / "own.npy", np.eye(3))
    embeddings = notebook(f"# Parameters\ndataset = {str(tmp_path / 'own.npy')!r}\n")
    with pytest.raises(ValueError, match="images are needed in this chapter; 05 takes embeddings"):
        read_parameters(embeddings, takes="images")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "bta = 0.7",
            r"bta=0\.7: there is no such parameter here \(did you mean 'beta'\?\); "
            "allowed are dataset, beta, num_heads",
        ),
        ("split = 'test'", "split='test': there is no such parameter here; allowed are"),
        ("beta = 0.0", r"beta=0\.0: a number above 0 up to 1 is allowed"),
        ("num_heads = 1e2", r"num_heads=100\.0: a whole number from 1 is allowed"),
        ("dataset = 'mnist'", "dataset='mnist': one of 'digits', 'fashion-mnist'"),
        ("dataset = 5", "dataset=5: text is allowed"),
    ],
)
def test_bad_parameters_are_named_in_one_line(cell, message):
    with pytest.raises(ValueError, match=message) as error:
        read_parameters(notebook(f"# Parameters\n{cell}\n"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(force_recompute="false"), "force_recompute='false': True or False is allowed"),
        (dict(on_divergence="no"), "on_divergence='no': one of 'stop', 'retry' is allowed"),
        (dict(overwrite=1), "overwrite=1: True or False is allowed"),
        (dict(run_dir=3), "run_dir=3: text or None is allowed"),
        (dict(backbone="resnet"), "backbone='resnet': one of 'pixels', .* is allowed"),
    ],
)
def test_bad_jobs(settings, message):
    with pytest.raises(ValueError, match=message):
        JobConfig(**settings)


def test_embeddings_of_ones_own_need_no_settings_of_images(tmp_path):
    file = str(tmp_path / "x.npy")
    np.save(file, np.eye(4, dtype=np.float32))
    assert len(JobConfig(dataset=file).load()) == 4
    for setting in (dict(split="test"), dict(labels="folders"), dict(backbone="dinov2_vits14"),
                    dict(image_size=28), dict(weights="a.pth")):  # fmt: skip
        (name,) = setting
        with pytest.raises(ValueError, match=f"{name}='?.*: .* is allowed, since dataset="):
            JobConfig(dataset=file, **setting)


def test_options_of_the_run():
    job, _ = read_parameters(notebook())
    assert job.options == asdict(RunOptions())
    assert JobConfig(resume="auto", checkpoint_every=3).options["checkpoint_every"] == 3


def test_default_runs_are_told_apart():
    kept = JobConfig(run_dir="mine", force_recompute=True, resume="auto", on_divergence="retry")
    assert is_default(kept, TrainConfig(device="cpu"))
    assert not is_default(JobConfig(), TrainConfig(beta=0.7))
    assert not is_default(JobConfig(), TrainConfig(recipe="paper"))
    assert not is_default(JobConfig(), TrainConfig(num_clusters=10))


def test_a_job_embeds_as_it_says(monkeypatch):
    given = {}

    def embed(images, backbone, **options):
        given.update(options, backbone=backbone)
        return Features.from_array(np.ones((5, 3)))

    monkeypatch.setattr("temi.parameters.embed", embed)
    job = JobConfig(backbone="pixels@4", data_dir="there", force_recompute=True)
    config = TrainConfig(device="cpu", precision="fp32")
    job.embed(load_images("digits"), config)
    assert given == {
        "backbone": "pixels@4", "weights": None, "image_size": None, "data_dir": "there",
        "device": "cpu", "precision": "fp32", "force_recompute": True,
    }  # fmt: skip
