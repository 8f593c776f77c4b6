"""What a run will cost: operations as PyTorch counts them, figures as measured, arithmetic."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import temi
from benchmarks.costs import power_law
from temi import costs, neighbors
from temi.costs import flops_per_image
from temi.heads import MultiHead
from temi.steps import TrainState, training_step

GPU = json.loads(temi.results_file("benchmarks/gpu.json").read_text())
MEASURED = json.loads(temi.results_file("benchmarks/costs.json").read_text())


@pytest.mark.parametrize(
    ("name", "model", "side"),
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2", 224),
        ("dinov2_vitb14", "vit_base_patch14_dinov2", 224),
        ("dinov2_vitb14", "vit_base_patch14_dinov2", 448),
        ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2", 224),
        ("dinov2_vitl14", "vit_large_patch14_dinov2", 224),
        ("dinov2_vitg14", "vit_giant_patch14_dinov2", 224),
    ],
)
def test_operations_are_those_that_pytorch_counts(name, model, side):
    """On the architectures themselves, without memory for their weights."""
    import timm

    with torch.device("meta"):
        network = timm.create_model(model, img_size=side, num_classes=0).eval()
        image = torch.zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    assert flops_per_image(name, side) == pytest.approx(counter.get_total_flops(), rel=0.01)
    weights = sum(parameter.numel() for parameter in network.parameters())
    assert costs._weights(name) == pytest.approx(weights, rel=0.05)


def test_operations_of_the_efficient_network_are_near_those_counted():
    """Its authors count 407 million products; timm's form has the same layers."""
    import timm

    with torch.device("meta"):
        network = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
        image = torch.zeros(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    assert flops_per_image("efficientnet_lite0") == pytest.approx(
        counter.get_total_flops(), rel=0.1
    )


def test_a_million_images_by_hand():
    table = temi.estimate_costs(10**6, "dinov2_vitb14", "h100", cores=8)
    seconds = table["seconds"]
    assert seconds["embed"] == pytest.approx(46.32e9 * 1e6 / (0.299 * 989.4e12), rel=1e-3)
    assert seconds["read"] == pytest.approx(1e6 * costs.MEASURED["read_seconds"] / 8)
    stages = seconds[["neighbours", "train", "label"]].sum()
    longer = max(seconds["read"], seconds["embed"])
    assert seconds["in all"] == pytest.approx(stages + longer)
    assert table.loc["embed", "disk (GB)"] == pytest.approx(1e6 * (768 * 2 + 30) / 1e9)
    assert (table["hours"] * 3600).to_numpy() == pytest.approx(seconds.to_numpy())


@pytest.mark.parametrize("hardware", costs.HARDWARE)
def test_costs_grow_as_they_should(hardware):
    one, two = (temi.estimate_costs(n, "dinov2_vits14", hardware) for n in (10**6, 2 * 10**6))
    growth = two / one
    assert growth["seconds"][["read", "embed"]].to_numpy() == pytest.approx(2)
    assert growth.loc["train", "seconds"] == pytest.approx(2, rel=1e-3)
    exponent = MEASURED["stages"]["approximate-search" if hardware == "cpu" else "exact-search"]
    exponent = exponent["fit"]["exponent"]
    assert growth.loc["neighbours", "seconds"] == pytest.approx(2**exponent, rel=0.02)
    assert growth.loc["embed", "disk (GB)"] == pytest.approx(2)
    larger = temi.estimate_costs(10**6, "dinov2_vitl14", hardware)
    shares = costs.UTILISATION["dinov2_vitl14"] / costs.UTILISATION["dinov2_vits14"]
    more = 13 if hardware == "cpu" else 13 / shares  # larger products come nearer to the peak
    assert larger["seconds"]["embed"] > more * one["seconds"]["embed"]
    zoomed = temi.estimate_costs(10**6, "dinov2_vits14", hardware, image_size=448)
    assert zoomed["seconds"]["embed"] > 4 * one["seconds"]["embed"]
    both = temi.estimate_costs(10**6, "dinov2_vits14+dinov2_vits14@448", hardware)
    apart = [table["seconds"]["embed"] for table in (one, zoomed)]
    assert both["seconds"]["embed"] == pytest.approx(sum(apart))


def test_ranks_share_what_can_be_shared():
    one, eight = (temi.estimate_costs(10**6, hardware="a100", ranks=r)["seconds"] for r in (1, 8))
    shared = ["read", "embed", "neighbours"]
    assert (one / eight)[shared].to_numpy() == pytest.approx(8)
    assert one["label"] == eight["label"]
    steps = 4 * (10**6 // 128)
    least = steps * costs.ON_GPU["eager_step_seconds"]
    assert eight["train"] == pytest.approx(least)  # a GPU waits for its next operator
    assert one["train"] < least / 2  # and does not, where steps are recorded
    one, two = (temi.estimate_costs(10**5, ranks=r)["seconds"] for r in (1, 2))
    assert one["train"] == pytest.approx(2 * two["train"])


def test_settings_of_the_training_count():
    def train(**settings):
        config = temi.TrainConfig(**{"num_clusters": 100, "epochs": 4} | settings)
        return temi.estimate_costs(10**5, config=config)["seconds"]["train"]

    assert train(epochs=8) == pytest.approx(2 * train())
    assert train(num_heads=8) == pytest.approx(train() / 2)
    assert train(batch_size=256) == pytest.approx(train(), rel=0.01)  # half as many steps
    assert train(num_clusters=1000) > 1.5 * train()
    assert train(pca_dim=512) > 1.4 * train()


def test_a_cpu_searches_exactly_as_long_as_the_search_does():
    below, above = (
        temi.estimate_costs(n)["seconds"]["neighbours"]
        for n in (neighbors.EXACT_UP_TO, neighbors.EXACT_UP_TO + 1)
    )
    assert below > 2 * above


def test_t4_has_no_bf16():
    """So its products are fp32, as the precision "auto" makes them."""
    t4, l4 = (temi.estimate_costs(10**6, hardware=name)["seconds"] for name in ("t4", "l4"))
    assert t4["embed"] / l4["embed"] == pytest.approx(121 / 8.1)


@pytest.mark.parametrize("stage", costs.POWER_LAWS)
def test_power_laws_are_those_of_the_results(stage):
    fit = MEASURED["stages"][stage]["fit"]
    measured = fit["seconds_at_100000"], fit["exponent"]
    assert costs.POWER_LAWS[stage] == pytest.approx(measured, rel=0.01)


def test_figures_are_those_of_the_results():
    step, forward = MEASURED["step"], MEASURED["forward"]
    shares = {(point["backbone"], point["pixels"]): point["share_of_peak"] for point in forward}
    embedding = json.loads(temi.results_file("benchmarks/embedding.json").read_text())
    assert {
        "peak_gflops": MEASURED["peak_gflops"],
        "vit_share": pytest.approx(shares["dinov2_vits14", 224], rel=0.01),
        "efficientnet_share": pytest.approx(shares["efficientnet_lite0", 224], rel=0.01),
        "read_seconds": pytest.approx(MEASURED["read"]["seconds"], rel=0.01),
        "step_seconds": pytest.approx(step["seconds"], rel=0.01),
        "step_seconds_per_cluster": pytest.approx(step["seconds_per_cluster"], rel=0.01),
        "embedding_gb": pytest.approx(embedding["peak_memory_mb"]["60000"] / 1e3, rel=0.01),
    } == costs.MEASURED


def test_figures_of_a_gpu_are_those_of_the_results():
    peak = costs.HARDWARE["h200"].bf16 * 1e12
    for point in GPU["forward"]:
        if point["pixels"] == 224:
            share = point["images_per_s"] * flops_per_image(point["backbone"]) / peak
            assert costs.UTILISATION[point["backbone"]] == pytest.approx(share, rel=0.01)
    few = [point for point in GPU["step"] if point["images"] == 10_000]
    clusters, graph = ([point[name] for point in few] for name in ("clusters", "graph_ms"))
    slope, constant = np.polyfit(clusters, np.array(graph) / 1e3, 1)
    eager = np.mean([point["ms"] for point in GPU["step"]]) / 1e3
    assert {
        "step_seconds": pytest.approx(constant, rel=0.01),
        "step_seconds_per_cluster": pytest.approx(slope, rel=0.01),
        "eager_step_seconds": pytest.approx(eager, rel=0.01),
    } == costs.ON_GPU


def test_an_h200_takes_about_as_long_as_told():
    """What is carried over from a CPU, too: the search, and labels, of which less is understood."""
    for point in GPU["whole"][1:]:  # the smallest takes milliseconds
        config = temi.TrainConfig(num_clusters=100)
        told = temi.estimate_costs(point["images"], hardware="h200", config=config)["seconds"]
        assert told["neighbours"] == pytest.approx(point["exact-search"], rel=0.5)
        width, resolved = 256, config.resolve(point["images"])
        for step in GPU["step"]:
            seconds = costs._step_seconds(
                dataclasses.replace(resolved, num_clusters=step["clusters"]), width, "h200", 1
            )
            assert seconds == pytest.approx(step["graph_ms"] / 1e3, rel=0.15)


@pytest.mark.parametrize("stage", ["exact-search", "approximate-search"])
def test_memory_is_as_measured(stage):
    """At the largest size, what was resident in a process that did nothing else."""
    point = MEASURED["stages"][stage]["points"][-1]
    told = temi.estimate_costs(point["images"]).loc["neighbours", "memory (GB)"]
    assert told == pytest.approx(point["peak_gb"], rel=0.35)


def test_disk_is_what_a_checkpoint_takes(tmp_path):
    config = temi.TrainConfig(num_clusters=10, num_heads=4, num_neighbors=3, device="cpu")
    state = TrainState.start(MultiHead(32, 10, 4), 1e-4)
    training_step(state, torch.randn(8, 32), config, 1e-4)  # the optimiser has its moments now
    labels = torch.zeros(4, 200_000, dtype=torch.int32)
    torch.save(state.capture() | {"labels": labels}, tmp_path / "checkpoint.pth")
    told = costs._disk(200_000, 32, config, 32)["train"] * 1e9 / 3
    assert told == pytest.approx((tmp_path / "checkpoint.pth").stat().st_size, rel=0.03)


def test_power_law_finds_the_exponent_and_foretells():
    points = [{"images": n, "seconds": 3e-9 * n**1.5} for n in (10**3, 10**4, 10**5)]
    fit = power_law(points)
    assert (fit["exponent"], fit["exponent_error"]) == (1.5, 0)
    assert fit["seconds_at_100000"] == pytest.approx(3e-9 * 1e5**1.5, abs=1e-3)
    assert fit["left_out"]["error"] == pytest.approx(0, abs=1e-3)
    points[-1]["seconds"] *= 2  # larger than foretold
    assert power_law(points)["left_out"]["error"] == -0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images=0: a whole number from 1 is allowed"),
        ({"num_images": 1e6}, "num_images=1000000.0: a whole number from 1 is allowed"),
        ({"ranks": 0}, "ranks=0: a whole number from 1 is allowed"),
        ({"cores": True}, "cores=True: a whole number from 1 is allowed"),
        ({"image_size": -1}, "image_size=-1: a whole number from 1 is allowed"),
        ({"hardware": "k80"}, "hardware='k80': one of 'cpu', 't4', 'l4', "),
        ({"backbone": "dinov2"}, "backbone='dinov2': the operations of 'pixels', "),
        ({"num_images": 50}, "num_clusters=100: at most 50 is allowed with 50 images"),
    ],
)
def test_errors_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")) as error:
        temi.estimate_costs(**{"num_images": 1000} | arguments)
    assert "\n" not in str(error.value)


def test_a_batch_that_memory_decides_is_reckoned_as_the_recipes():
    asked = temi.TrainConfig(num_clusters=100, batch_size="auto")
    found = temi.estimate_costs(10**6, config=asked)
    pd.testing.assert_frame_equal(found, temi.estimate_costs(10**6))


def test_pixels_are_as_many_as_the_image_has():
    disks = [temi.estimate_costs(10**6, *what).loc["embed", "disk (GB)"]
             for what in (("pixels",), ("pixels@8",))]  # fmt: skip
    assert disks == pytest.approx([(3 * side**2 * 2 + 30) / 1e3 for side in (224, 8)])


def test_registers_and_joined_backbones_count():
    plain, registers = (flops_per_image(f"dinov2_vits14{r}") for r in ("", "_reg"))
    assert 1.01 < registers / plain < 1.03  # 261 tokens instead of 257
    one, both, small = (
        temi.estimate_costs(10**5, name, "h100")
        for name in ("dinov2_vits14", "dinov2_vits14+pixels@8", "pixels@8")
    )
    assert both["seconds"]["read"] == pytest.approx(2 * one["seconds"]["read"])
    disk = [table.loc["embed", "disk (GB)"] for table in (one, both, small)]
    assert disk[1] + 30e-4 == pytest.approx(disk[0] + disk[2])
    reg = temi.estimate_costs(10**5, "dinov2_vits14_reg", "h100")["seconds"]["embed"]
    assert reg / one["seconds"]["embed"] == pytest.approx(registers / plain)


def test_a_hundred_thousand_images_on_one_core_by_hand():
    config = temi.TrainConfig(num_clusters=100, pca_dim=256)
    seconds = temi.estimate_costs(10**5, "efficientnet_lite0", config=config, cores=8)["seconds"]
    assert seconds["read"] == pytest.approx(1e5 * 0.00553)  # the one core reads, too
    assert seconds["embed"] == pytest.approx(1e5 * 2 * 407e6 / (0.421 * 96.4e9))
    assert seconds["neighbours"] == pytest.approx(105)
    assert seconds["label"] == pytest.approx(2 * 15.3 + 4 * 0.107)
    assert seconds["in all"] == pytest.approx(seconds.drop("in all").sum())


def test_memory_and_disk_by_hand():
    config = temi.TrainConfig(
        num_clusters=100, num_neighbors=50, pca_dim=2000
    )  # more than there are
    k, heads, group = config.num_neighbors, config.num_heads, config.group_size
    for hardware in ("cpu", "h100"):
        table = temi.estimate_costs(
            10**6, "dinov2_vits14+dinov2_vitb14", hardware, ranks=2, config=config
        )
        memory, disk, seconds = (table[c] for c in ("memory (GB)", "disk (GB)", "seconds"))
        row, found = 4 * (384 + 768), 12 * k * (3 if hardware == "cpu" else 1)
        search = 0.4 + (3 * row + found) / 1e3 + 0.27 * (hardware != "cpu")
        assert memory["neighbours"] == pytest.approx(search)
        assert memory["train"] == pytest.approx(0.4 + (row + 12 * k + 8 * group + 16 * heads) / 1e3)
        assert memory["embed"] - memory["read"] == pytest.approx(0.34, abs=0.01)  # the larger's
        assert memory["in all"] == memory.drop("in all").max()
        assert disk["in all"] == pytest.approx(disk.drop("in all").sum())
        assert disk["label"] == pytest.approx(0.04)
        hidden = 0 if hardware == "cpu" else min(seconds["read"], seconds["embed"])
        assert seconds["in all"] == pytest.approx(seconds.drop("in all").sum() - hidden)


def test_a_side_in_the_name_goes_before_image_size():
    for name, size in (("dinov2_vits14@448", 224), ("pixels@8", 16)):
        pd.testing.assert_frame_equal(
            temi.estimate_costs(10**5, name, image_size=size), temi.estimate_costs(10**5, name)
        )
    pd.testing.assert_frame_equal(
        temi.estimate_costs(10**5, "pixels", image_size=8), temi.estimate_costs(10**5, "pixels@8")
    )


def test_rows_of_more_numbers_take_longer_and_groups_too():
    def stage(name, hardware="cpu", **settings):
        config = temi.TrainConfig(**{"num_clusters": 100, "pca_dim": 256} | settings)
        return temi.estimate_costs(10**5, hardware=hardware, config=config)["seconds"][name]

    assert stage("neighbours", pca_dim=512) == pytest.approx(2 * stage("neighbours"))
    faster = costs.HARDWARE["h100"].fp32 / costs.HARDWARE["cpu"].fp32
    assert stage("neighbours") == pytest.approx(faster * stage("neighbours", "h100"))
    assert stage("train", group_size=8) == pytest.approx(2 * stage("train", group_size=4))


def test_a_size_that_a_backbone_does_not_take_is_refused():
    with pytest.raises(ValueError, match="image_size=100: a multiple of 14 is allowed"):
        flops_per_image("dinov2_vits14", 100)
    with pytest.raises(ValueError, match="image_size=13: a multiple of 14 is allowed"):
        temi.estimate_costs(1000, "dinov2_vits14@13")


def test_a_number_of_images_that_numpy_computed():
    expected = temi.estimate_costs(1000)
    pd.testing.assert_frame_equal(temi.estimate_costs(np.int64(1000)), expected)
