# SPDX-License-Identifier: MIT
"""The figures that train with PyTorch, on small made-up images in the layouts of the real data sets."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from helpers.figures import run_figure  # noqa: E402
from tolerances import tolerance  # noqa: E402

from dlnfast import figures  # noqa: E402
from dlnfast.cli import main  # noqa: E402
from dlnfast.figures._claims import Claim, falls_geometrically, rises_then_saturates  # noqa: E402

PER_CLASS = 12
RESULTS = Path(__file__).parents[1] / "docs" / "results"


def draw_class_images(shape, per_class, seed):
    """Ten classes around means of their own, and few enough samples to be fitted."""
    means = np.random.default_rng(0).uniform(40, 215, (10, *shape))
    noise = np.random.default_rng(seed).normal(0, 40, (10, per_class, *shape))
    labels = np.repeat(np.arange(10, dtype=np.uint8), per_class)
    return np.clip(means[:, None] + noise, 0, 255).astype(np.uint8).reshape(-1, *shape), labels


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for prefix, seed in (("train", 1), ("t10k", 2)):
        pixels, labels = draw_class_images((28, 28), PER_CLASS, seed)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes()
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    names = {f"data_batch_{n}": n for n in range(1, 6)} | {"test_batch": 9}
    (folder / "cifar-10-batches-bin").mkdir()
    for name, seed in names.items():
        pixels, labels = draw_class_images((3, 32, 32), PER_CLASS, seed)
        rows = np.hstack([labels[:, None], pixels.reshape(len(labels), -1)])
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(rows.tobytes())
    return folder


SMALL = ["--per-class", str(PER_CLASS), "--test-per-class", str(PER_CLASS)]


def test_mlp_vs_hybrid_writes_its_numbers(tmp_path, image_folder, capsys):
    options = [*SMALL, "--width", "24", "--epochs", "40", "--batch-size", "30", "--hybrid-scale", "0.3"]
    options += ["--mlp-learning-rate", "0.01", "--hybrid-learning-rate", "0.001", "--data", str(image_folder)]
    found = run_figure(tmp_path, "mlp-vs-hybrid", *options)["numbers"]
    for name, nonlinear in (("MLP", 7), ("hybrid", 3)):
        record = found["networks"][name]
        assert record["n_nonlinear"] == nonlinear
        for key in ("probe_train", "probe_test", "compression", "discrimination", "simplex_deviation"):
            assert len(record[key]) == 7
        assert all(0 <= share <= 1 for share in record["probe_train"] + record["probe_test"])
        assert all(rank <= 24 for rank in record["ranks"]["nuclear"])
        assert record["loss"][-1] < record["loss"][0]
        assert found["panels"]["compression"]["curves"][name] == record["compression"]
        assert found["panels"]["compression"]["theory"][name] == found["published"][name]["compression"]
    printed = capsys.readouterr().out
    assert "published ~ 23.5 12.8 3.95" in printed
    verdicts = {claim["text"]: claim["shown"] for claim in found["claims"]}
    assert len(verdicts) == 5
    for text, shown in verdicts.items():
        assert f"{'shown' if shown else 'NOT SHOWN'}: {text}" in printed


DEPTH = ["--depths", "3", "5", "--added-to", "1", "--others", "2", "--width", "16", "--epochs", "3"]
DEPTH += ["--images", "60", "--validation", "40", "--batch-size", "20", "--runs", "3", "--seed", "4"]
DEPTH += ["--learning-rates", "0.03", "1e30"]


@pytest.fixture(scope="module")
def role_of_depth(tmp_path_factory, image_folder):
    """The file of results and the numbers of a small role-of-depth."""
    folder = tmp_path_factory.mktemp("depth")
    options = [*DEPTH, "--results", str(folder / "results.jsonl"), "--data", str(image_folder)]
    return folder / "results.jsonl", run_figure(folder, "role-of-depth", *options)["numbers"]


def test_role_of_depth_writes_its_numbers(role_of_depth):
    _, found = role_of_depth
    for dataset in ("fashion-mnist", "cifar10"):
        for loss in ("cross_entropy", "squared"):
            records = {(r["nonlinear"], r["depth"]): r for r in found["networks"][dataset][loss]}
            assert set(records) == {(1, 2), (1, 3), (1, 5), (2, 3), (4, 5), (2, 5)}
            start = [run["test_accuracy"] for run in records[1, 2]["runs"]]
            assert [run["seed"] for run in records[1, 2]["runs"]] == [4, 5, 6]
            assert "gain" not in records[1, 2]
            for (k, depth), record in records.items():
                # Of both rates, one diverges; only the networks that are compared choose.
                assert record["learning_rate"] == 0.03
                accuracies = [run["test_accuracy"] for run in record["runs"]]
                assert record["test_accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
                assert all(len(run["compression"]) == depth - 1 for run in record["runs"])
                logs = np.log([run["last_compression"] for run in record["runs"]])
                np.testing.assert_allclose(record["compression"], np.exp(logs.mean(axis=0)))
                if (k, depth) == (2, 5):
                    assert record["validation_accuracy"] is None
                    assert len(record["runs"]) == 1
                    continue
                assert record["validation_accuracy"]["1e+30"] == 0.0
                assert len(record["runs"]) == 3
                if depth > 2:
                    gaps = np.subtract(accuracies, start)
                    assert np.mean(record["gain"]) == pytest.approx(np.mean(gaps))
                    # The two-sided 95 % point of Student's t with two degrees of freedom.
                    half = 4.302653 * np.std(gaps, ddof=1) / np.sqrt(3)
                    assert np.ptp(record["gain"]) == pytest.approx(2 * half)
            published = np.log10(found["published"][dataset]["5"])
            distances = np.abs(np.log10(records[1, 5]["runs"][1]["last_compression"]) - published)
            assert records[1, 5]["distances"][1] == pytest.approx(np.mean(distances))
            assert records[1, 3]["distances"] is None
    panel = found["panels"]["cifar10"]["gain"]["squared"]
    assert panel["x"] == [2, 3, 5]
    assert panel["curves"]["linear layers"][0] == 0.0
    texts = [claim["text"] for claim in found["claims"]]
    assert len(texts) == 4 * 6
    assert "CIFAR-10, squared loss: linear layers from L = 2 to 5 improve generalisation" in texts


def test_role_of_depth_trains_only_networks_without_results(role_of_depth, image_folder, tmp_path):
    path, found = role_of_depth
    lines = path.read_text().splitlines()
    # 6 networks and 2 rates per data set and loss; 5 of them choose and have 3 seeds.
    assert len(lines) == 4 * (5 * 2 + 5 * 3 + 1)
    again = run_figure(tmp_path, "role-of-depth", *DEPTH, "--results", str(path), "--data", "/nowhere")
    assert again["numbers"] == found
    # Without its last lines, and the end of the one before, the file gets the same numbers.
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join([*lines[:-2], lines[-2][:50]]))
    options = [*DEPTH, "--results", str(cut), "--data", str(image_folder)]
    assert run_figure(tmp_path, "role-of-depth", *options)["numbers"] == found
    assert sorted(cut.read_text().splitlines()) == sorted(lines)
    cut.write_text(lines[0].replace('"seed": 1000', '"seed": 1001') + "\n")
    assert main(["figure", "role-of-depth", "--results", str(cut), "--out", str(tmp_path)]) == 2


def test_images_of_role_of_depth_must_be_there(tmp_path, image_folder, capsys):
    options = [*DEPTH, "--validation", "61", "--data", str(image_folder), "--out", str(tmp_path)]
    assert main(["figure", "role-of-depth", *options]) == 2
    message = "images (60) and validation (61) are more than the 120 training images of fashion-mnist"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["fashion-mnist", "cifar10"])
def test_shipped_results_draw_role_of_depth_without_training(monkeypatch, dataset):
    from dlnfast.figures import role_of_depth

    def refuse(*unused):
        raise AssertionError("a network was trained")

    monkeypatch.setattr(role_of_depth, "train_hybrid", refuse)
    monkeypatch.setattr(role_of_depth, "read_images", refuse)
    found = role_of_depth.compute(role_of_depth.Settings(datasets=(dataset,)))
    for records in found.numbers["networks"][dataset].values():
        assert [len(r["runs"]) for r in records if r["validation_accuracy"]] == [5] * 7
    with pytest.raises(AssertionError, match="a network was trained"):
        role_of_depth.compute(role_of_depth.Settings(width=255))


SMALL_SPECTRA = [*SMALL, "--width", "40", "--vgg", "vgg11", "--vgg-width", "0.1", "--epochs", "4"]
SMALL_SPECTRA += ["--vit-dim", "32", "--vit-depth", "2", "--vit-heads", "2", "--vit-patch", "16"]
SMALL_SPECTRA += ["--batch-size", "30", "--full-steps", "10", "--runs", "2"]


@pytest.fixture(scope="module")
def penultimate_spectra(tmp_path_factory, image_folder):
    """Folder and numbers of a small penultimate-spectra."""
    folder = tmp_path_factory.mktemp("spectra")
    found = run_figure(folder, "penultimate-spectra", *SMALL_SPECTRA, "--data", str(image_folder))
    return folder, found["numbers"]


def test_penultimate_spectra_writes_its_numbers(penultimate_spectra):
    _, found = penultimate_spectra
    shapes = {family: record["shape"] for family, record in found["families"].items()}
    assert shapes == {"linear": [40, 40], "mlp": [40, 40], "vgg": [51, 51], "vit": [32, 128]}
    for family, record in found["families"].items():
        assert [run["seed"] for run in record["runs"]] == [0, 1]
        for run in record["runs"]:
            mini, full = (run["trainings"][name] for name in ("mini", "full"))
            values = np.array(mini["values"])
            expected = [np.sum(values[:k] ** 2) / np.sum(values**2) for k in (10, 20)]
            # Spectra are stored with six digits.
            np.testing.assert_allclose(mini["energy"], expected, rtol=0, atol=1e-5)
            # Values within rounding errors of zero, of a matrix of low rank, do not count.
            edge = max(mini["noise_edge"], 1e-10 * values[0])
            assert mini["above_noise"] == np.sum(values > edge), family
            assert np.linalg.norm(values) == pytest.approx(np.linalg.norm(run["random"]["values"]), rel=1e-5)
            assert run["random"]["above_noise"] == 0
            assert mini["energy"][1] > run["random"]["energy"][1]
            # The last entry of the trace is the end of the training.
            assert mini["trace"]["outside"][-1] == pytest.approx(1 - mini["energy"][1], abs=1e-12)
            assert mini["trace"]["loss"][-1] == pytest.approx(mini["loss"])
            assert mini["steps"] == 4 * 4
            assert full["steps"] == (full["trace"]["epoch"][-1] if full["is_matched"] else 10)
            assert full["is_matched"] == (full["loss"] <= mini["loss"])
            report = run["reports"]["mini"]
            assert report["scores"][-1] == pytest.approx(mini["test_accuracy"], abs=0.01)
            assert report["scores_without"][0] is None
    assert len(found["claims"]) == 4 * 6
    for claim in found["claims"]:
        assert claim["verdict"] in ("shown", "refuted", "not decided")
        assert len(claim["interval"]) == 2


def test_penultimate_spectra_compares_tails_seed_by_seed(penultimate_spectra):
    _, found = penultimate_spectra
    tails = {
        name: np.array([1 - run["trainings"][name]["energy"][1] for run in found["families"]["mlp"]["runs"]])
        for name in ("mini", "shuffled", "full")
    }
    claims = {claim["text"].split(",")[0]: claim for claim in found["claims"]}
    for text, differences in {
        "MLP: 20 directions hold more of the change than with shuffled labels": tails["shuffled"]
        - tails["mini"],
        "MLP: full batches leave less than half the energy outside of 20 directions": tails["mini"] / 2
        - tails["full"],
    }.items():
        assert np.mean(claims[text]["interval"]) == pytest.approx(np.mean(differences), abs=1e-12)
    panel = found["panels"]["mlp"]["energy"]
    assert panel["curves"]["mini-batches"][19] == pytest.approx(100 * np.mean(tails["mini"]), abs=1e-3)


def test_results_of_penultimate_spectra_are_drawn_again(penultimate_spectra, tmp_path):
    folder, found = penultimate_spectra
    options = ["--results", str(folder / "penultimate-spectra.json"), "--data", "/nowhere"]
    assert run_figure(tmp_path, "penultimate-spectra", *options)["numbers"] == found


def test_networks_of_penultimate_spectra_have_their_published_sizes():
    from dlnfast.figures import penultimate_spectra
    from dlnfast.torch import ImageData, Samples, weight_matrices

    images = Samples(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
    data = ImageData(images, images, (0.0,) * 3, (1.0,) * 3)
    settings = penultimate_spectra.Settings(device="meta")
    sizes = {}
    with torch.device("meta"):
        for family in ("vgg", "vit"):
            model = penultimate_spectra._make_network(settings, family, data, seed=0)
            (matrix,) = weight_matrices(model, "penultimate")
            sizes[family] = (matrix.shape, sum(p.numel() for p in model.parameters()))
    # VGG-16 with batch norm and one hidden linear layer; ViT-B for images of 32 x 32 in patches of 8 x 8.
    n_blocks = 12 * (4 * (768**2 + 768) + 2 * 4 * 768**2 + 5 * 768 + 4 * 768)
    n_patches, n_tokens, n_ends = 3 * 8 * 8 * 768 + 768, 18 * 768, 2 * 768 + 10 * 768 + 10
    n_convolutions = 14_714_688  # arXiv 1409.1556, configuration D
    n_norms = 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512)
    assert sizes["vgg"] == ((512, 512), n_convolutions + n_norms + 512**2 + 512 + 10 * 512 + 10)
    assert sizes["vit"] == ((768, 4 * 768), n_blocks + n_patches + n_tokens + n_ends)


SMALL_HEADS = ["--layers", "1", "3", "--per-class", str(PER_CLASS), "--test-per-class", str(PER_CLASS)]
SMALL_HEADS += ["--vgg-width", "0.1", "--epochs", "5", "--batch-size", "20", "--runs", "2"]


@pytest.fixture(scope="module")
def projection_heads(tmp_path_factory, image_folder):
    """Folder and numbers of a small projection-heads."""
    folder = tmp_path_factory.mktemp("heads")
    found = run_figure(folder, "projection-heads", *SMALL_HEADS, "--data", str(image_folder))
    return folder, found["numbers"]


def test_projection_heads_writes_its_numbers(projection_heads):
    _, found = projection_heads
    first, second = found["runs"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["source"] != second["source"]
    for run in found["runs"]:
        assert len(set(run["source"])) == 5
        assert [head["layers"] for head in run["heads"]] == [1, 3]
        for head in run["heads"]:
            assert head["compression"] > 0
            assert all(0 <= head[name] <= 1 for name in ("transfer", "source_test_accuracy"))
    transfer = np.array([[head["transfer"] for head in run["heads"]] for run in found["runs"]])
    (curve,) = (c for label, c in found["panels"]["transfer"]["curves"].items() if label != "published")
    np.testing.assert_allclose(curve, 100 * transfer.mean(axis=0))
    assert found["panels"]["transfer"]["curves"]["published"] == pytest.approx([60.1, 65.6])
    collapse, gain = found["claims"]
    assert np.mean(gain["interval"]) == pytest.approx(np.mean(transfer[:, 1] - transfer[:, 0]))
    logs = np.log10([[head["compression"] for head in run["heads"]] for run in found["runs"]])
    assert np.mean(collapse["interval"]) == pytest.approx(np.mean(logs[:, 1] - logs[:, 0]))


def test_results_of_projection_heads_are_drawn_again(projection_heads, tmp_path):
    folder, found = projection_heads
    options = ["--results", str(folder / "projection-heads.json"), "--data", "/nowhere"]
    assert run_figure(tmp_path, "projection-heads", *options)["numbers"] == found


@pytest.mark.parametrize(("trunk", "expected"), [("vgg", [1, 4]), ("mlp", [4, 7])])
def test_heads_share_their_trunk_and_differ_in_depth(trunk, expected):
    from dlnfast.figures import projection_heads

    settings = projection_heads.Settings(trunk=trunk, vgg_width=0.1, width=20, depth=3)
    models = [projection_heads._make_network(settings, count, seed=3) for count in (1, 4)]
    (one, layer), (four, other) = models
    assert layer == other
    last = [list(dict(model.named_modules())[layer].parameters()) for model in (one, four)]
    assert all(torch.equal(a, b) for a, b in zip(*last, strict=True))
    linear = [sum(isinstance(m, torch.nn.Linear) for m in model.modules()) for model in (one, four)]
    assert linear == expected


def test_projection_heads_trains_an_mlp_too(tmp_path, image_folder):
    options = [*SMALL_HEADS, "--trunk", "mlp", "--width", "20", "--depth", "2", "--probe", "ridge"]
    found = run_figure(tmp_path, "projection-heads", *options, "--data", str(image_folder))["numbers"]
    # The classes of these images are easy.
    assert min(head["source_train_accuracy"] for run in found["runs"] for head in run["heads"]) > 0.5


@pytest.mark.parametrize("name", ["penultimate-spectra", "projection-heads"])
def test_stored_results_of_the_documentation_can_be_read(name):
    path = RESULTS / f"{name}.json"
    module = figures.load(name)
    result = module.compute(figures.make_settings(module.Settings, {"results": str(path)}))
    runs = result.numbers.get("runs") or result.numbers["families"]["mlp"]["runs"]
    assert [run["seed"] for run in runs] == list(range(len(runs)))
    assert all(claim["interval"][0] <= claim["interval"][1] for claim in result.numbers["claims"])
    assert module.details(None, result)


def test_classes_of_a_part_are_counted_from_zero():
    from dlnfast.figures.projection_heads import _choose
    from dlnfast.torch import Samples

    samples = Samples(torch.arange(6.0)[:, None], torch.tensor([4, 1, 7, 4, 0, 7]))
    kept = _choose(samples, np.array([4, 7]))
    assert kept.inputs[:, 0].tolist() == [0, 2, 3, 5]
    assert kept.labels.tolist() == [0, 1, 0, 1]


RATES = ["--learning-rates", "0.001", "0.003", "--rate-runs", "1", "--batch-size", "40"]


@pytest.fixture(scope="module")
def efficient_training(tmp_path_factory, image_folder):
    """Folder and numbers of a small efficient-training."""
    folder = tmp_path_factory.mktemp("efficient")
    options = [*SMALL, *RATES, "--width", "32", "--rank", "4", "--epochs", "4", "--every", "2", "--runs", "2"]
    found = run_figure(folder, "efficient-training", *options, "--data", str(image_folder))
    return folder, found["numbers"]


def test_efficient_training_writes_its_numbers(efficient_training):
    _, found = efficient_training
    n_inputs = {"fashion-mnist": 28 * 28, "cifar10": 3 * 32 * 32}
    for dataset, records in found["networks"].items():
        first = 32 * n_inputs[dataset]
        others = 32 + 32 + 10 * 32 + 10
        # Plain layers; three full factors; 32 x 4, 4 x 4 and 4 x 32; the same in the first layer.
        product = 32 * 4 + 4 * 4 + 4 * 32
        expected = [
            first + 32 * 32 + others,
            first + 3 * 32 * 32 + others,
            first + product + others,
            4 * n_inputs[dataset] + 4 * 4 + 32 * 4 + product + others,
        ]
        assert [record["n_parameters"] for record in records] == expected
        for record in records:
            assert record["epochs"] == [2, 4]
            last = [run["test_accuracy"][-1] for run in record["runs"]]
            assert [run["seed"] for run in record["runs"]] == [0, 1]
            assert record["mean"][-1] == pytest.approx(np.mean(last))
            assert record["deviation"][-1] == pytest.approx(np.std(last, ddof=1))
            tried = record["validation_accuracy"]
            assert tried[f"{record['learning_rate']:g}"] == max(tried.values())
            assert len(tried) == 2
            # The curve starts after the set-up of the factors, and tests take none of its time.
            epochs = np.median([run["epoch_seconds"] for run in record["runs"]], axis=0)
            assert record["seconds"][-1] == pytest.approx(record["setup_seconds"] + epochs.sum())
            assert record["milliseconds_per_step"] == pytest.approx(1e3 * np.median(epochs) / 3)
    assert len(found["claims"]) == 8


def test_results_of_an_earlier_call_are_drawn_again(efficient_training, tmp_path, capsys):
    folder, found = efficient_training
    results = folder / "efficient-training.json"
    again = run_figure(tmp_path, "efficient-training", "--results", str(results))["numbers"]
    assert again == found
    assert main(["figure", "low-rank-mlp", "--results", str(results), "--out", str(tmp_path)]) == 2
    assert "has no 'energy'" in capsys.readouterr().err


def test_compression_writes_its_numbers(tmp_path, image_folder):
    options = [*SMALL, "--width", "40", "--vgg-width", "0.1", "--vit-dim", "32", "--vit-depth", "1"]
    options += ["--epochs", "2", "--runs", "2", "--ranks", "4", "12", "--n-data", "40", "--batch-size", "30"]
    found = run_figure(tmp_path, "compression", *options, "--data", str(image_folder))["numbers"]
    assert list(found["networks"]) == ["mlp", "vgg", "vit"]
    for family, record in found["networks"].items():
        assert record["ranks"] == [4, 12]
        methods = record["methods"]
        assert list(methods) == ["weights", "data", "pruning"]
        for method in methods.values():
            assert np.shape(method["runs"]) == (2, 2)
            np.testing.assert_allclose(method["mean"], np.mean(method["runs"], axis=1))
            np.testing.assert_allclose(method["deviation"], np.std(method["runs"], axis=1, ddof=1))
            assert method["parameters"][0] < 0.7 * record["parameters"], family
        assert methods["pruning"]["parameters"] == methods["data"]["parameters"]
        assert methods["pruning"]["error"] == [None, None]
        assert all(error > 0 for error in methods["weights"]["error"][:1])
    assert len(found["claims"]) == 9


def test_low_rank_mlp_writes_its_numbers(tmp_path, image_folder):
    options = [*SMALL, *RATES, "--width", "32", "--ranks", "4", "20", "--epochs", "3", "--runs", "2"]
    options += ["--energy-per-class", str(PER_CLASS), "--energy-steps", "5", "--energy-activations", "tanh"]
    options += ["relu", "--activations", "relu", "--data", str(image_folder)]
    found = run_figure(tmp_path, "low-rank-mlp", *options)["numbers"]
    rows = found["networks"]["relu"]["low rank"]
    assert {(row["init"], row["rank"]) for row in rows} == {
        (start, rank) for start in ("gradient", "surrogate", "random") for rank in (4, 20)
    }
    panel = found["panels"]["accuracy relu"]
    assert panel["x"] == [4, 20]
    for start, curve in panel["curves"].items():
        assert curve == pytest.approx([100 * row["mean"][-1] for row in rows if row["init"] == start])
    for records in found["energy"].values():
        tanh, relu = records
        for record in records:
            shares = np.array(record["inside"])
            assert shares.shape == (5, 2)
            assert np.all((shares >= 0) & (shares <= 1 + tolerance(np.float32, 28 * 28)))
            assert np.all(shares[0] > np.array(record["random"][0]))
            assert record["loss"][-1] < record["loss"][0]
        # The first update is the gradient, whose leading directions the subspace has; tanh is odd and smooth.
        assert min(tanh["inside"][0]) > 0.9
        assert min(tanh["inside"][-1]) > min(relu["inside"][-1])
    texts = [claim["text"] for claim in found["claims"]]
    assert 'ReLU, r = 20: "gradient" is at least 0.7 points above "random"' in texts
    assert len(texts) == 4 + 2 * 2


def test_rates_that_diverge_are_not_chosen():
    from dlnfast.figures import _mlp_training, efficient_training
    from dlnfast.torch import ImageData, Samples

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 1, 4, 4, generator=generator)
    labels = (inputs[:, 0, 0, 0] > 0).long()
    samples = Samples(inputs, labels)
    split = _mlp_training.split_images(ImageData(samples, samples, (0.0,), (1.0,), 2), seed=0)
    assert len(split.validation.labels) == 12
    assert len(split.part.labels) == 48
    # The parts are those of the training images, each with its own label.
    joined = torch.cat([split.validation.inputs, split.part.inputs])
    assert torch.equal(joined, split.train.inputs)
    assert torch.equal((split.train.inputs[:, 0, 0, 0] > 0).long(), split.train.labels)
    settings = efficient_training.Settings(
        width=8, epochs=3, batch_size=16, learning_rates=(1e30, 1e-2), rate_runs=1
    )
    rate, found = _mlp_training.choose_rate(settings, _mlp_training.Method("original"), "relu", split)
    assert rate == 1e-2
    assert found["1e+30"] == 0.0
    assert found["0.01"] > 0.0


def test_relu_panels_are_drawn(tmp_path, capsys):
    options = ["--activations", "linear", "relu", "--runs", "1", "--depths", "3", "--relu-depths", "3"]
    options += ["--scales", "0.5", "--inits", "orthogonal", "normal", "--relu-steps", "3000"]
    options += ["--sweep-depth", "3", "--learning-rate", "10"]
    numbers = run_figure(tmp_path, "progressive-collapse", *options)["numbers"]
    linear, relu = numbers["depth"][0], numbers["relu depth"][0]
    assert relu["engine"] == "torch"
    assert relu["converged"]
    assert relu["final_loss"] <= 1e-6 / 250
    # The same samples; the first layer of either starts from the same weights.
    assert relu["compression"][0] == pytest.approx(linear["compression"][0], rel=1e-10)
    assert relu["compression"] == sorted(relu["compression"], reverse=True)
    assert {"relu scale", "relu init"} <= set(numbers)
    assert "relu depth  L = 3" in capsys.readouterr().out


def test_without_torch_linear_panels_are_drawn(run_python, tmp_path):
    program = """
import sys
sys.modules["torch"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *arguments: None if name == "torch" else found(name, *arguments)
from dlnfast.cli import main
options = ["--runs", "1", "--depths", "3", "--scales", "0.5", "--inits", "orthogonal"]
assert main(["figure", "progressive-collapse", "--out", sys.argv[1], *options]) == 0
assert main(["figure", "progressive-collapse", "--out", sys.argv[1], "--activations", "relu"]) == 2
assert main(["figure", "penultimate-spectra", "--out", sys.argv[1]]) == 2
"""
    assert "ReLU networks need PyTorch" in run_python(program, tmp_path)
    numbers = json.loads((tmp_path / "progressive-collapse.json").read_text())["numbers"]
    assert "pip install torch" in numbers["note"]
    assert "relu depth" not in numbers


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp-vs-hybrid", ["--n-nonlinear", "6"], "n_nonlinear is 6"),
        ("mlp-vs-hybrid", ["--data", "/nowhere"], "no CIFAR-10 (train) at /nowhere"),
        ("role-of-depth", ["--runs", "0"], "runs is 0"),
        ("role-of-depth", ["--depths", "3"], "depths[0] is 3"),
        ("role-of-depth", ["--rate-seed", "2"], "rate_seed is 2"),
        ("penultimate-spectra", ["--depth", "2"], "depth is 2"),
        ("efficient-training", ["--depth", "1"], "depth is 1"),
        ("efficient-training", ["--every", "0"], "every is 0"),
        ("low-rank-mlp", ["--ranks", "600"], "ranks[0] is 600"),
        ("low-rank-mlp", ["--results", "/nowhere"], "/nowhere"),
        ("penultimate-spectra", ["--full-steps", "0"], "full_steps is 0"),
        ("penultimate-spectra", ["--full-rate", "0"], "full_rate is 0"),
        ("penultimate-spectra", ["--runs", "1"], "runs is 1"),
        ("projection-heads", ["--layers", "0"], "layers[0] is 0"),
        ("projection-heads", ["--source-classes", "1"], "source_classes is 1"),
        ("projection-heads", ["--runs", "1"], "runs is 1"),
        ("deep-lora-teacher", ["--ranks", "4", "65"], "ranks[1] is 65"),
        ("deep-lora-teacher", ["--rate-rank", "1"], "rate_rank is 1"),
        ("deep-lora-teacher", ["--final-rate", "2"], "final_rate is 2"),
    ],
)
def test_errors_name_bad_options(tmp_path, capsys, name, options, message):
    assert main(["figure", name, "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


TEACHER = [
    "--width",
    "16",
    "--ranks",
    "2",
    "8",
    "--rate-rank",
    "4",
    "--samples",
    "60",
    "--test-samples",
    "80",
]


@pytest.mark.filterwarnings("ignore")
def test_deep_lora_teacher_writes_its_numbers(tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is optional")
    options = [*TEACHER, "--steps", "30", "--seeds", "3", "--rate-seeds", "2"]
    found = run_figure(tmp_path, "deep-lora-teacher", *options)["numbers"]
    assert len(found["methods"]) == 6
    for method, record in found["methods"].items():
        errors = np.array(record["errors"])
        assert errors.shape == np.shape(record["norms"]) == (2, 3)
        assert record["rate"] == record["rates"][int(np.argmin(record["rate_errors"]))]
        label = importlib.import_module("dlnfast.figures.deep_lora_teacher").LABELS[method]
        np.testing.assert_allclose(found["panels"]["error"]["curves"][label], errors.mean(axis=1))
    # With one eta, the ranks train alike from the first steps; their updates have about the same norm.
    few, many = np.mean(found["methods"]["deep-lora"]["norms"], axis=1)
    assert 0.5 < few / many < 2
    assert len(found["claims"]) == 4
    assert "Deep LoRA, defaults of 0.1.0" in capsys.readouterr().out


def test_errors_of_deep_lora_teacher_are_relative_to_the_pretrained_network(tmp_path):
    options = [*TEACHER, "--steps", "1", "--seeds", "2", "--rate-seeds", "1", "--etas", "0"]
    found = run_figure(tmp_path, "deep-lora-teacher", *options, "--methods", "deep-lora")["numbers"]
    record = found["methods"]["deep-lora"]
    np.testing.assert_allclose(record["errors"], 1.0, atol=1e-4)
    np.testing.assert_allclose(record["norms"], 0.0, atol=1e-4)


def test_quick_states_the_expected_duration():
    module = figures.load("role-of-depth")
    assert figures.quick_takes(module) == "in some minutes"
    assert figures.quick_takes(figures.load("edge-of-stability")) == "in under a minute"


def test_claims_are_judged_by_their_numbers():
    assert rises_then_saturates([0.5, 0.8, 0.95, 0.96, 0.95], 3, 0.01)[0]
    assert not rises_then_saturates([0.5, 0.8, 0.95, 0.7, 0.6], 3, 0.01)[0]  # does not stay
    assert not rises_then_saturates([0.95, 0.95, 0.95, 0.95], 3, 0.01)[0]  # did not rise
    shown, ratio, text = falls_geometrically([1, 2, 3], [1.0, 0.1, 0.01])
    assert shown
    assert ratio == pytest.approx(0.1)
    assert text == "factor 0.1 a layer, R^2 of the logarithms 1.000"
    assert not falls_geometrically([1, 2, 3, 4], [1.0, 0.01, 0.009, 0.0089])[0]
    assert not falls_geometrically([1, 2, 3], [1.0, 2.0, 4.0])[0]
    assert str(Claim("it falls", False, "factor 2")) == "NOT SHOWN: it falls (factor 2)"
