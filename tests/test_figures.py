# SPDX-License-Identifier: MIT
"""Figures without PyTorch models: their numbers; and the registry, captions and claims of all figures."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.figures import run_figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dlnfast import build_info, figures
from dlnfast._config.finetuning import Outcome, Row
from dlnfast.cli import main
from dlnfast.figures import deep_lora_fewshot
from dlnfast.figures._captions import mark_quick, set_title, write_caption
from dlnfast.figures._claims import Claim, as_numbers, compare_pairs, t_interval
from dlnfast.theory import rho_flow


@pytest.fixture(scope="module")
def evolution_figure(tmp_path_factory):
    return run_figure(tmp_path_factory.mktemp("evolution"), "svd-evolution")


@pytest.fixture(scope="module")
def collapse_figure(tmp_path_factory):
    return run_figure(tmp_path_factory.mktemp("collapse"), "progressive-collapse", "--activations", "linear")


@pytest.fixture(scope="module")
def edge_figure(tmp_path_factory):
    options = ["--quick", "--sweep-points", "60", "--sharpness-every", "25"]
    return run_figure(tmp_path_factory.mktemp("edge"), "edge-of-stability", *options)


@pytest.fixture(scope="module")
def features_figure(tmp_path_factory):
    options = ["--depths", "2", "3", "--assumption-width", "60", "--widths", "50", "80"]
    options += ["--assumption-depth", "3"]
    return run_figure(tmp_path_factory.mktemp("features"), "feature-compression-theory", *options)


# svd-evolution


def test_evolution_meets_the_published_numbers(evolution_figure):
    numbers = evolution_figure["numbers"]
    assert numbers["engine"] == "reduced"
    assert round(numbers["rho"][50], 4) == 0.9510
    assert round(numbers["rho_flow"][50], 4) == 0.9511
    assert numbers["singular values"]["middle"]["multiplicity"] == 24
    assert numbers["problem"]["loss_scale"] == 1 / 900
    top = [column[-1] for column in numbers["singular values"]["top"]["values"]]
    bottom = [column[-1] for column in numbers["singular values"]["bottom"]["values"]]
    # Read off the published plot; the digits depend on the seed.
    assert all(1.2 < value < 1.6 for value in top)
    assert all(0.7 < value < 0.9 for value in bottom)
    assert max(numbers["right vectors"]["middle"]["high"]) == 0


def test_evolution_records_what_it_depends_on(evolution_figure):
    assert evolution_figure["settings"] == {
        "dim": 30,
        "depth": 3,
        "rank": 3,
        "scale": 1.0,
        "learning_rate": 1.0,
        "steps": 50,
        "momentum": 0.0,
        "seed": 0,
        "layer": 1,
        "inputs": "white",
        "samples": 300,
        "reference": "limit",
        "engine": "auto",
    }
    assert evolution_figure["environment"]["dlnfast"] == build_info()
    assert {"numpy", "matplotlib"} <= set(evolution_figure["environment"]["packages"])
    assert evolution_figure["numbers"]["training_seconds"] < evolution_figure["seconds"]["all"]
    assert len(evolution_figure["numbers"]["loss"]) == 51


def test_left_and_right_mirror_between_the_first_and_the_last_layer(tmp_path, evolution_figure):
    last = run_figure(tmp_path, "svd-evolution", "--layer", "3")["numbers"]
    first = evolution_figure["numbers"]
    for side, other in (("right vectors", "left vectors"), ("left vectors", "right vectors")):
        here = [column[-1] for column in first[side]["top"]["values"]]
        there = [column[-1] for column in last[other]["top"]["values"]]
        # The same roles, for other singular vectors of the target.
        assert np.median(here) == pytest.approx(np.median(there), rel=0.3)


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_both_engines_give_the_same_figure(tmp_path, evolution_figure, engine):
    other = run_figure(tmp_path, "svd-evolution", "--engine", engine)["numbers"]
    assert other["engine"] == engine
    for name in ("singular values", "right vectors", "left vectors"):
        for group in ("top", "bottom"):
            # Vectors of a dense run are as accurate as the gaps between singular values after one step allow.
            np.testing.assert_allclose(
                other[name][group]["values"],
                evolution_figure["numbers"][name][group]["values"],
                rtol=0,
                atol=1e-9,
            )


def test_evolution_with_gaussian_inputs_uses_the_dense_engine(tmp_path):
    gaussian = run_figure(tmp_path, "svd-evolution", "--inputs", "gaussian", "--layer", "2")["numbers"]
    assert gaussian["engine"] == "dense"
    assert gaussian["problem"]["dim_out"] == 3
    assert "rho" not in gaussian


def test_evolution_with_momentum_uses_the_reduced_engine_and_draws_no_flow(tmp_path):
    options = ["--momentum", "0.9", "--reference", "first_step"]
    momentum = run_figure(tmp_path, "svd-evolution", *options)["numbers"]
    assert momentum["engine"] == "reduced"
    assert momentum["right vectors"]["reference"] == "first_step"
    assert "rho_flow" not in momentum


def test_evolution_in_another_setting_follows_the_flow(tmp_path):
    options = ["--dim", "200", "--rank", "2", "--depth", "2", "--steps", "9"]
    wide = run_figure(tmp_path, "svd-evolution", *options)
    assert wide["numbers"]["singular values"]["middle"]["multiplicity"] == 196
    assert wide["numbers"]["rho"][-1] == pytest.approx(rho_flow(9, 1.0, 2, 1 / 40_000, 1.0), rel=1e-7)


def test_evolution_is_the_same_at_any_width(tmp_path):
    # The width changes singular values only through the random orientation of the target's frames.
    published, wide = (
        run_figure(tmp_path, "svd-evolution", "--dim", dim)["numbers"] for dim in ("30", "10000")
    )
    assert wide["singular values"]["middle"]["multiplicity"] == 9_994
    np.testing.assert_allclose(wide["rho"], published["rho"], rtol=1e-14)
    assert round(wide["rho"][50], 4) == 0.9510
    top = [np.array(numbers["singular values"]["top"]["values"]) for numbers in (published, wide)]
    np.testing.assert_allclose(top[0], top[1], rtol=0.15)


# progressive-collapse


def test_collapse_meets_the_published_numbers(collapse_figure):
    deep = {record["depth"]: record for record in collapse_figure["numbers"]["depth"]}
    assert list(deep) == [6, 8, 10]
    values = deep[8]["compression"]
    assert values[0] == pytest.approx(11.25, rel=1e-12)
    assert values[7] == pytest.approx(8.47e-5, rel=2e-3)  # median of 20 seeds, whose standard error is 0.15 %
    assert round(deep[8]["fit"]["ratio"], 4) == 0.1854
    assert round(deep[8]["theory_ratio"], 4) == 0.1875
    # Seeds differ by about one per cent.
    assert 0.97 * values[7] < deep[8]["least"][7] < values[7] < deep[8]["largest"][7] < 1.03 * values[7]


def test_collapse_can_be_stopped_by_the_mean_loss(tmp_path):
    """The other interpretation of the published rule; it stops before the deepest layers have converged."""
    options = ["--tolerance", "2.5e-4", "--depths", "8", "--scales", "0.5", "--inits", "orthogonal"]
    options += ["--activations", "linear"]
    record = run_figure(tmp_path, "progressive-collapse", *options)["numbers"]["depth"][0]
    assert record["compression"][7] == pytest.approx(9.65e-5, rel=0.01)
    assert record["fit"]["ratio"] == pytest.approx(0.1878, abs=3e-4)


def test_collapse_uses_the_reduced_engine_where_it_applies(collapse_figure):
    numbers = collapse_figure["numbers"]
    for panel in ("depth", "scale", "init"):
        for record in numbers[panel]:
            assert record["converged"]
            assert record["final_loss"] <= 1e-6 / 250
            assert record["engine"] == ("reduced" if record["init"] == "orthogonal" else "dense")
            assert record["fit"]["ratio"] < 0.25
            if record["engine"] == "reduced":
                assert record["training_seconds"] < 0.2  # milliseconds on an idle machine
                assert record["fit"]["ratio"] == pytest.approx(record["theory_ratio"], rel=0.035)
    ratios = [record["fit"]["ratio"] for record in numbers["scale"]]
    assert ratios == sorted(ratios, reverse=True)


def test_collapse_reports_runs_that_did_not_converge(tmp_path, capsys):
    options = ["--depths", "3", "--scales", "0.5", "--inits", "orthogonal", "--steps", "2", "--runs", "1"]
    options += ["--activations", "linear"]
    numbers = run_figure(tmp_path, "progressive-collapse", *options)["numbers"]
    assert [numbers["depth"][0][key] for key in ("converged", "steps", "runs")] == [False, [2], 1]
    assert "NOT CONVERGED" in capsys.readouterr().out


# optimizers


def test_only_adam_leaves_the_subspaces(tmp_path):
    pytest.importorskip("torch")
    numbers = run_figure(tmp_path, "optimizers", "--steps", "60", "--dim", "16", "--rank", "2")["numbers"]
    shares, moved = numbers["final_share"], numbers["moved_values"]
    assert list(shares) == ["gradient descent", "Nesterov", "Muon", "Shampoo", "Adam"]
    assert shares.pop("Adam") > 0.05
    assert max(shares.values()) < 1e-12
    assert moved.pop("Adam") == 16
    assert set(moved.values()) == {4}


# edge-of-stability


def test_edge_meets_the_published_thresholds(edge_figure):
    numbers = edge_figure["numbers"]
    thresholds = list(numbers["thresholds"].values())
    assert [round(threshold, 4) for threshold in thresholds] == [0.0309, 0.0331, 0.0356]
    spacing = np.diff(numbers["sweep"]["parameter"])[0]
    for onset, threshold in zip(numbers["onsets"].values(), thresholds, strict=True):
        # Just below, convergence takes more steps than the sweep computes.
        assert onset[0] < threshold < onset[1] + spacing
    # For every mode the period doubles at 1.244 times its threshold.
    for pair, threshold in zip(numbers["period_doublings"].values(), thresholds, strict=True):
        assert pair[0] / threshold == pytest.approx(1.244, abs=2 * spacing / threshold)


def test_the_number_of_oscillating_modes_matches_theory(edge_figure):
    columns = edge_figure["numbers"]["columns"]
    assert [column["learning_rate"] for column in columns] == [0.0305, 0.032, 0.0335, 0.0363]
    for modes, column in enumerate(columns):
        assert column["oscillating"] == column["oscillating_in_theory"] == modes
        assert column["difference_from_recursion"] < 1e-11
        resting = zip(column["late_low"][modes:], (10.0, 9.5, 9.0)[modes:], strict=True)
        assert all(low == pytest.approx(sigma, rel=1e-5) for low, sigma in resting)
    stable = columns[0]
    assert stable["loss"]["loss"][-1] < 1e-15
    minimum = 3 * 10 ** (4 / 3)
    assert stable["late_sharpness_low"] == pytest.approx(minimum, rel=1e-4)
    assert stable["late_sharpness_high"] == pytest.approx(minimum, rel=1e-4)
    for column in columns[1:]:
        assert column["late_sharpness_high"] > minimum > 2 / column["learning_rate"]


def test_edge_accepts_other_targets(tmp_path):
    options = ["--singular-values", "4", "--dim", "2", "--depth", "2", "--learning-rates", "0.24", "0.26"]
    options += ["--scale", "0.1", "--steps", "300", "--sharpness-every", "101", "--sweep-from", "0.24"]
    options += ["--sweep-to", "0.26", "--sweep-points", "3", "--sweep-steps", "2000"]
    numbers = run_figure(tmp_path, "edge-of-stability", *options)["numbers"]
    assert [column["oscillating"] for column in numbers["columns"]] == [0, 1]
    assert list(numbers["thresholds"].values()) == [0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--singular-values", "9", "10"],
            "singular_values is [9.0, 10.0]; wanted at most dim = 5, descending",
        ),
        (["--singular-values", "9", "8", "--dim", "1"], "wanted at most dim = 1"),
        (["--sharpness-every", "0"], "sharpness_every is 0"),
        (["--late", "1"], "late is 1"),
    ],
)
def test_errors_name_bad_options_of_edge(tmp_path, capsys, options, message):
    assert main(["figure", "edge-of-stability", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_edge_names_the_regions_of_the_largest_mode(tmp_path, edge_figure):
    numbers = edge_figure["numbers"]
    first = next(iter(numbers["thresholds"]))
    onset, doubling, chaos = (numbers[name][first] for name in ("onsets", "period_doublings", "chaos"))
    assert onset[1] < doubling[0] < doubling[1] <= chaos[0]
    # Lyapunov exponents of the scalar recursion are negative at 0.0403 and positive at 0.041.
    assert 0.0403 < chaos[1] < 0.0412
    module = figures.load("edge-of-stability")
    settings = figures.make_settings(
        module.Settings, {**module.QUICK, "learning_rates": (0.0305,), "sharpness_every": 301}
    )
    *_, sweep = module.draw(settings, module.compute(settings)).axes
    assert [text.get_text() for text in sweep.texts] == [
        "fixed point",
        "cycle of two",
        "cycles of 4, 8, ..",
        "chaos, with periodic windows",
    ]


# power-method, init-scale, depth-width, burer-monteiro


@pytest.fixture(scope="module")
def power_figure(tmp_path_factory):
    options = ["--dim", "40", "--published-rank", "4", "--steps", "9000", "--every", "300"]
    options += ["--learning-rate", "3", "--rank", "2", "--observed", "0.6"]
    return run_figure(tmp_path_factory.mktemp("power"), "power-method", *options)


def test_the_first_step_has_the_subspaces_of_the_target(power_figure):
    first = power_figure["numbers"]["first_step"]
    for label, values in first["angles"].items():
        bounds = first["bounds"][label]
        assert all(value <= bound for value, bound in zip(values, bounds, strict=True))
        # The bound is nearly met: the sine is of order eps^L.
        assert all(value > 0.8 * bound for value, bound in zip(values, bounds, strict=True))


def test_two_layers_follow_the_power_iteration_and_three_are_faster(power_figure):
    numbers = power_figure["numbers"]
    for name in ("two_layers", "three_layers"):
        record = numbers[name]
        until = [i for i, step in enumerate(record["steps"]) if step < record["residual_until"]]
        ratios = np.array(record["training"])[until] / np.array(record["iteration"])[until]
        if name == "two_layers":
            np.testing.assert_allclose(ratios, 1, rtol=1e-2)
        else:
            assert ratios[0] > 0.99
            assert ratios[-1] < 0.5
            assert np.all(np.diff(ratios) < 0)


def test_leading_vectors_turn_to_those_of_the_target(power_figure):
    for label, values in power_figure["numbers"]["similarity"]["curves"].items():
        assert values[0] < 0.9
        assert max(values) > 0.9
        if "all entries" in label:
            assert values[-1] > 0.99


def test_init_scale_stays_within_the_bounds(tmp_path, capsys):
    options = ["--dim", "30", "--rank", "2", "--depths", "2", "3", "--scales", "5e-5", "0.01", "0.1", "1.0"]
    options += ["--drawn", "0.01", "1.0", "--runs", "2", "--steps", "200000"]
    columns = run_figure(tmp_path, "init-scale", *options)["numbers"]["columns"]
    shallow, deep = (list(column["scales"]) for column in columns)
    assert all(entry["bounds"] is None for entry in shallow)
    untrained, small, middle, large = deep
    assert untrained["learned"]["median"] is None
    assert untrained["bounds"][0] > 200_000
    assert "not trained" in capsys.readouterr().out
    for entry in (small, middle):
        least, most = entry["escape_over_T"]
        assert 1 < least <= most < 2
        assert entry["escape"]["median"] < entry["learned"]["median"]
    assert small["escape"]["median"] == pytest.approx(10 * middle["escape"]["median"], rel=0.1)
    assert large["bounds"] is None
    # Other directions start at eps^L and decay slowly.
    assert large["learned"]["median"] > 10 * middle["learned"]["median"]


def test_iterations_do_not_depend_on_the_width(tmp_path):
    options = ["--widths", "30", "3000", "--depths", "2", "3", "--runs", "4"]
    numbers = run_figure(tmp_path, "depth-width", *options)["numbers"]
    for entries in numbers["runs"].values():
        assert [entry["engine"] for entry in entries] == ["reduced"] * 2
        narrow, wide = (entry["steps"] for entry in entries)
        assert narrow["median"] == pytest.approx(wide["median"], rel=0.2)
        assert wide["largest"] - wide["least"] <= narrow["largest"] - narrow["least"]
    wide = numbers["runs"]["$L = 3$"][1]
    assert wide["bounds"][0] < wide["steps"]["median"] < wide["bounds"][1]


def test_wide_shallow_networks_do_not_complete_the_matrix(tmp_path, capsys):
    options = ["--dim", "40", "--rank", "2", "--widths", "2", "40", "--runs", "2", "--scale", "0.01"]
    options += ["--shallow-learning-rate", "20", "--deep-learning-rate", "40", "--steps", "20000"]
    numbers = run_figure(tmp_path, "burer-monteiro", *options)["numbers"]
    (_, shallow), (_, deep) = (
        [entry["error"]["mean"] for entry in entries] for entries in numbers["runs"].values()
    )
    assert deep < 1e-3 * shallow
    assert list(numbers["curves"]) == [f"$L = {depth}$, width {w}" for depth in (2, 3) for w in (2, 40)]
    assert numbers["sensitivity"]["change"] == 1e-12
    assert "the loss rises in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("power-method", ["--published-rank", "30"], "published_rank is 30; wanted at most 20"),
        ("power-method", ["--fraction", "0"], "fraction is 0"),
        ("init-scale", ["--depths", "1"], "depths is 1"),
        ("init-scale", ["--drawn", "0.7"], "drawn has 0.7"),
        ("depth-width", ["--widths", "20"], "widths is 20"),
        ("depth-width", ["--runs", "0"], "runs is 0"),
        ("burer-monteiro", ["--every", "0"], "every is 0"),
    ],
)
def test_errors_name_bad_options_of_depth_and_scale(tmp_path, capsys, name, options, message):
    assert main(["figure", name, "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


# feature-compression-theory

#: C_0 .. C_5 of one seed, printed in the authors' notebook.
PUBLISHED = [11.9993305, 3.4821217, 0.9843595, 0.2763253, 0.07745831, 0.02171478]


def test_features_meet_the_published_numbers(features_figure):
    record = features_figure["numbers"]["features"]
    assert record["converged"]
    assert record["runs"] == 20
    compression = record["compression"]
    ratios = np.divide(compression["compression"][1:], compression["compression"][:-1])
    # Seeds differ by 1.5 per cent around the median, and C_0, which is of the inputs alone, by 8.
    np.testing.assert_allclose(ratios, np.divide(PUBLISHED[1:], PUBLISHED[:-1]), rtol=0.01)
    assert compression["fit"]["ratio"] == pytest.approx(0.2824, rel=0.01)
    assert record["theory_ratio"] == pytest.approx(0.09 * 100 ** (1 / 3) / 10 ** (1 / 6))
    assert round(record["theory_ratio"], 4) == 0.2846
    assert compression["least"][0] < compression["compression"][0] < compression["largest"][0]


def test_discrimination_is_linear(features_figure):
    record = features_figure["numbers"]["features"]["discrimination"]
    assert record["fit"]["r_squared"] > 0.95
    assert record["fit"]["slope"] > 0
    assert record["theory"][0] is None
    # Finite scales and steps: 0.011 at most.
    np.testing.assert_allclose(record["discrimination"][1:], record["theory"][1:], rtol=0, atol=0.011)


def test_training_preserves_the_balance_of_layers(features_figure):
    numbers = features_figure["numbers"]
    assert [record["depth"] for record in numbers["depth"]] == [2, 3]
    assert [record["width"] for record in numbers["width"]] == [50, 80]
    for record in [*numbers["depth"], *numbers["width"]]:
        assert record["converged"]
        assert record["imbalance"] == pytest.approx(record["imbalance_of_the_start"], rel=0.02)
        assert 0 < record["distance_from_least_norm"] < 0.05 * record["least_norm"]
    imbalances = [record["imbalance"] for record in numbers["width"]]
    assert imbalances == sorted(imbalances)


def test_features_report_runs_that_did_not_converge(tmp_path, capsys):
    options = ["--runs", "1", "--steps", "2", "--depths", "2", "--assumption-width", "50", "--widths", "50"]
    numbers = run_figure(tmp_path, "feature-compression-theory", *options)["numbers"]
    assert numbers["features"]["converged"] is False
    assert "NOT CONVERGED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples-per-class", "20"], "dim is 50; wanted at least the number of samples"),
        (["--n-classes", "1"], "n_classes is 1"),
        (["--runs", "0"], "runs is 0"),
        (["--multiplier", "0"], "multiplier is 0"),
        (["--depth", "1"], "depth is 1; wanted an integer of at least 2"),
        (["--depths", "1", "2"], "depths is 1"),
        (["--assumption-depth", "1"], "assumption_depth is 1"),
    ],
)
def test_errors_name_bad_options_of_features(tmp_path, capsys, options, message):
    assert main(["figure", "feature-compression-theory", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


# factorisation-compressed, completion-compressed, sensing-compressed

FACTORISATION = ["--dim", "80", "--full-dim", "40", "--rank", "3", "--scale", "1e-2", "--steps", "2600"]
FACTORISATION += ["--records", "26", "--compared", "13", "--spaced-dim", "20", "--spaced-rank", "3"]
FACTORISATION += ["--spaced-learning-rate", "0.3", "--spaced-scale", "0.1", "--spaced-steps", "1500"]
COMPLETION = ["--dim", "60", "--full-dim", "40", "--rank", "2", "--observed", "0.5", "--scale", "2e-2"]
COMPLETION += ["--steps", "1500", "--every", "20", "--outer", "0", "0.01", "0.1"]
COMPLETION += ["--narrow-outer", "0.1", "--narrow-ranks", "2", "4"]
COMPLETION += ["--narrow-steps", "3000", "--deep-dim", "40", "--deep-rank", "2", "--deep-widths", "4", "40"]
COMPLETION += ["--deep-steps", "4000", "--deep-scale", "0.05", "--deep-learning-rate", "5"]
COMPLETION += ["--deep-observed", "0.5", "--alpha-dim", "40", "--alpha-rank", "2"]
COMPLETION += ["--alpha-observed", "0.5", "--alpha-scale", "0.1", "--alpha-learning-rate", "3"]
COMPLETION += ["--alpha-steps", "3000", "--alphas", "1", "5"]
SENSING = ["--dim", "20", "--rank", "2", "--measurements", "200", "--scale", "0.1", "--learning-rate", "1"]
SENSING += ["--steps", "1200", "--every", "40", "--outer", "0", "0.1", "--tolerance", "0"]


@pytest.fixture(scope="module")
def factorisation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factorisation")
    return run_figure(folder, "factorisation-compressed", *FACTORISATION)


@pytest.fixture(scope="module")
def completion_figure(tmp_path_factory):
    return run_figure(tmp_path_factory.mktemp("completion"), "completion-compressed", *COMPLETION)


@pytest.fixture(scope="module")
def sensing_figure(tmp_path_factory):
    return run_figure(tmp_path_factory.mktemp("sensing"), "sensing-compressed", *SENSING)


def test_full_and_compressed_factorisation_agree(factorisation):
    numbers = factorisation["numbers"]
    assert numbers["difference"] < 1e-12
    assert numbers["compared_steps"] == list(range(0, 2600, 200))
    runs = numbers["runs"]
    assert [run["engine"] for run in runs.values()] == ["dense", "reduced", "reduced"]
    curves = numbers["iterations"]["series"]
    full, compressed = curves["full"], curves["compressed"]
    assert full["x"] == compressed["x"]
    # Relative to the initial values, because residuals of a fitted matrix are rounding errors.
    np.testing.assert_allclose(full["y"], compressed["y"], rtol=1e-9, atol=1e-14 * full["y"][0])
    for run, curve in zip(runs.values(), curves.values(), strict=True):
        assert run["final_loss"] < 1e-10 * curve["y"][0]
    # The rate of another width takes as many steps.
    assert runs["full"]["learning_rate"] == pytest.approx(1e3 * 0.04**1.5)
    full, compressed = (np.array(path) for path in numbers["path"]["coordinates"].values())
    np.testing.assert_allclose(full, compressed, atol=1e-6 * np.ptp(full))
    assert sum(numbers["path"]["shares"]) == pytest.approx(1, abs=0.05)
    for panel in ("seconds", "spaced"):
        assert all(np.all(np.diff(curve["x"]) > 0) for curve in numbers[panel]["series"].values())
    assert {run["steps"] for run in numbers["spaced_runs"].values()} == {1500}


def test_learned_bases_complete_matrices_that_frozen_bases_do_not(completion_figure):
    numbers = completion_figure["numbers"]
    ends = {}
    for part in ("compressed", "beside_full"):
        ends[part] = [record["errors"][-1] for record in numbers[part].values()]
        assert all(record["diverged_at"] is None for record in numbers[part].values())
    frozen, slow, fast = ends["compressed"]
    assert fast < slow < 0.1 * frozen
    full, frozen, slow, fast = ends["beside_full"]
    assert max(full, fast) < slow < 0.5 * frozen
    apart = numbers["beside_full"]["full"]["distances"]
    frozen, slow, fast = (distances[-1] for distances in apart.values())
    assert fast < slow < frozen


def test_narrow_and_deep_networks_complete_the_matrix(completion_figure):
    numbers = completion_figure["numbers"]
    for entries in numbers["narrow"].values():
        assert [entry["rank"] for entry in entries] == [2, 4]
        assert all(0 < entry["steps"] <= entry["taken"] <= 3000 for entry in entries)
    shallow, deep = ([entry["error"] for entry in entries] for entries in numbers["depth"].values())
    assert deep[1] < shallow[1]
    alpha = list(numbers["alpha"].values())
    assert [record["errors"][-1] < 1e-3 * record["errors"][0] for record in alpha] == [True] * 3
    # Outer layers that learn faster take fewer iterations.
    reached = [sum(np.array(record["errors"]) > 0.1 * record["errors"][0]) for record in alpha]
    assert reached[2] < reached[1]


def test_completion_reports_diverged_runs(tmp_path, capsys):
    options = [*COMPLETION, "--outer", "0.01", "5"]
    options += ["--narrow-steps", "5", "--deep-steps", "5", "--alpha-steps", "5"]
    numbers = run_figure(tmp_path, "completion-compressed", *options)["numbers"]
    record = numbers["compressed"]["$\\gamma = 5$"]
    assert 0 < record["diverged_at"] <= 1500
    assert record["steps"][-1] <= record["diverged_at"]
    assert f"DIVERGES at iteration {record['diverged_at']}" in capsys.readouterr().out


def test_sensing_succeeds_with_learned_bases(sensing_figure):
    numbers = sensing_figure["numbers"]
    full, frozen, turning = numbers["runs"].values()
    assert full["steps"] == frozen["steps"] == turning["steps"] == list(range(0, 1201, 40))
    assert full["errors"][0] == pytest.approx(1, abs=0.01)
    assert frozen["errors"][-1] > 0.1
    assert max(full["errors"][-1], turning["errors"][-1]) < 0.01
    assert numbers["problem"]["n_observations"] == 200


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("factorisation-compressed", ["--records", "0"], "records is 0"),
        ("factorisation-compressed", [*FACTORISATION, "--spaced-rank", "9"], "spaced_rank is 9"),
        ("completion-compressed", ["--depth", "1"], "depth is 1"),
        ("completion-compressed", ["--every", "0"], "every is 0"),
        ("sensing-compressed", ["--outer-every", "0"], "outer_every is 0"),
        ("sensing-compressed", [*SENSING, "--depth", "1"], "depth is 1"),
    ],
)
def test_errors_name_bad_options_of_compressed(tmp_path, capsys, name, options, message):
    assert main(["figure", name, "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


# scaling

SCALING = ["--peers", "dlnfast-reduced", "dlnfast-dense", "numpy-thin", "--repeats", "1"]


@pytest.fixture(scope="module")
def scaling(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    sizes = ["--widths", "32", "10000", "--depths", "2", "--outputs", "2", "--memory-widths", "64", "10000"]
    return run_figure(folder, "scaling", "--quick", *SCALING, *sizes)


def test_scaling_measures_every_sweep(scaling):
    sweeps = scaling["numbers"]["sweeps"]
    assert list(sweeps) == ["width", "depth", "outputs", "samples", "threads", "memory"]
    for over, sweep in sweeps.items():
        assert sweep["over"] == over
        assert len(sweep["values"]) == len(sweep["rows"])
        assert {"processor", "packages", "thread_pools", "caps"} <= set(sweep["machine"])
        kind = "bytes" if over == "memory" else "seconds"
        for value, row in zip(sweep["values"], sweep["rows"], strict=True):
            wide = over in ("width", "memory") and value == 10000
            peers = {"dlnfast-reduced"} if wide else {"dlnfast-reduced", "dlnfast-dense", "numpy-thin"}
            assert {*row[kind], *row["skipped"]} == peers
    assert sweeps["width"]["rows"][-1]["setting"]["dim"] == 10000
    assert list(sweeps["width"]["rows"][-1]["seconds"]) == ["dlnfast-reduced"]
    assert sweeps["samples"]["rows"][-1]["setting"]["n_samples"] == 128
    memory = sweeps["memory"]["rows"]
    # Layers of 10^4 x 10^4 would take 1.6 GB.
    assert 0 < memory[-1]["bytes"]["dlnfast-reduced"] < 1e8


def test_scaling_is_drawn_from_a_file(tmp_path, scaling, capsys):
    sweeps = scaling["numbers"]["sweeps"]
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    whole.write_text(json.dumps({"results": [{"case": "scaling", "sweeps": sweeps}]}))
    part.write_text(json.dumps({"results": [sweeps["depth"], {"case": "thin", "rows": []}]}))
    assert run_figure(tmp_path, "scaling", "--results", str(whole))["numbers"]["sweeps"] == sweeps
    assert list(run_figure(tmp_path, "scaling", "--results", str(part))["numbers"]["sweeps"]) == ["depth"]
    part.write_text(json.dumps({"results": [{"case": "thin", "rows": []}]}))
    assert main(["figure", "scaling", "--results", str(part), "--out", str(tmp_path)]) == 2
    assert "part.json has no sweep" in capsys.readouterr().err


def test_labels_at_lines_do_not_overlap():
    spread_out = figures.load("scaling")._spread_positions
    positions = spread_out([10.0, 10.5, 11.0, 90.0, 99.0, 99.5], 0.0, 100.0)
    assert all(gap >= 11.0 - 1e-9 for gap in np.diff(positions))
    assert positions[0] >= 0
    assert positions[-1] <= 100
    assert spread_out([20.0, 60.0], 0.0, 100.0) == [20.0, 60.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--results", "no-such-file"], "no-such-file"),
        (["--outputs", "2000"], "outputs[0] is 2000"),
        (["--samples", "1000"], "samples[0] is 1000"),
        (["--depths", "1"], "depths[0] is 1"),
        (["--repeats", "0"], "repeats is 0"),
    ],
)
def test_errors_name_bad_options_of_scaling(tmp_path, capsys, options, message):
    assert main(["figure", "scaling", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


# The registry.


def test_quick_changes_only_options_that_were_not_set(edge_figure):
    assert edge_figure["quick"] is True
    settings = edge_figure["settings"]
    changed = {"sweep_points": 60, "sharpness_every": 25}
    quick = dict(figures.quick_settings(figures.load("edge-of-stability")))
    assert {name: settings[name] for name in quick} == {**quick, **changed}


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_quick_settings_are_existing_options(name):
    module = figures.load(name)
    quick = figures.quick_settings(module)
    settings = figures.make_settings(module.Settings, quick)
    assert (settings == module.Settings()) is not bool(quick)


@pytest.mark.parametrize("width", [5.0, 12.0])
def test_titles_have_one_line_that_fits(width):
    picture = Figure(figsize=(width, 2.0))
    set_title(picture, "A title of one line with $d = 30$ and some more words")
    mark_quick(picture)
    assert picture.get_suptitle().endswith("more words (quick setting)")
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    extent = picture.findobj(lambda artist: getattr(artist, "get_text", str)() == picture.get_suptitle())[0]
    assert extent.get_window_extent(canvas.get_renderer()).width < picture.bbox.width


def test_captions_have_the_details_the_quick_settings_and_the_claims():
    claims = as_numbers([Claim("it falls", False, "factor 2")])
    caption = write_caption("Title", "Width 5", {"runs": 5, "widths": (50, 100)}, claims)
    assert caption.splitlines() == [
        "Title. Width 5. Quick setting, smaller than the default: runs 5; widths 50, 100.",
        "it falls: factor 2 (not shown).",
    ]


def test_captions_are_written_with_the_numbers_and_the_pictures(tmp_path):
    options = ["--steps", "5", "--format", "png", "svg", "pdf"]
    caption = run_figure(tmp_path, "svd-evolution", *options)["caption"]
    assert caption.startswith("Layer 1 of 3 of a deep linear network, $d = 30$. $r = 3$, ")
    with Image.open(tmp_path / "svd-evolution.png") as image:
        assert image.text["Description"] == caption
    assert "step 1 on the mean loss" in (tmp_path / "svd-evolution.svg").read_text()


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([1.0, 2.0, 1.5], "shown"), ([-1.0, -2.0, -1.5], "refuted"), ([-1.0, 2.0, 0.5], "not decided")],
)
def test_intervals_decide_claims(differences, verdict):
    claim = compare_pairs("it rises", differences)
    assert claim.verdict == verdict
    assert ("would be found" in claim.measured) is (verdict == "not decided")
    mean, half = np.mean(differences), 4.302652729911275 * np.std(differences, ddof=1) / np.sqrt(3)
    assert claim.interval == pytest.approx((mean - half, mean + half))


@pytest.mark.parametrize(("wider", "verdict"), [(0.004, "shown"), (0.018, "not decided"), (0.06, "refuted")])
def test_scores_of_all_ranks_are_compared_by_intervals(wider, verdict):
    seeds = range(10)
    noise = np.random.default_rng(0).normal(size=(2, 10))
    noise -= noise.mean(axis=1, keepdims=True)

    def row(scores, norms):
        return Row("deep-lora", 16, 8, 0.03, dict(zip(seeds, scores, strict=True)), 0.0, [1] * 20, norms)

    level = 0.2 * noise[0]  # of a seed, which the differences do not have
    norms = {seed: 3.0 + noise[0, seed] for seed in seeds}
    rows = {
        "8": row(level, norms),
        "64": row(level + 0.001 * noise[1], norms),
        "full": row(level + wider + 0.005 * noise[1], {seed: 1.05 * norms[seed] for seed in seeds}),
    }
    claim = deep_lora_fewshot._compare_ranks("alike", rows)
    assert claim.verdict == verdict
    other = "64" if "r = full against 64" in claim.measured else "8"
    low, high = t_interval([rows["full"].scores[s] - rows[other].scores[s] for s in seeds])
    assert f"interval {low:+.3f} to {high:+.3f}, 10 seeds" in claim.measured
    claim = deep_lora_fewshot._compare_ranks("alike", rows, norms=True)
    assert claim.verdict == "shown"
    assert "factor 1.050" in claim.measured


#: A program that draws the few-shot figure where PyTorch and transformers are missing.
WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from dlnfast.cli import main
sys.exit(main(["figure", "deep-lora-fewshot", *sys.argv[1:]]))
"""


def store_few_shot_results(grid, results, progress):
    """Store results as if the runs of the grid were trained: scores of a seed, and of Deep LoRA."""
    for run in results.missing(grid):
        deep = run.method == "deep-lora"
        score = 0.1 * run.seed + 0.05 * deep - 0.1 * abs(np.log10(run.eta) + 2)
        ranks = {"layer.0": 1 if deep else run.rank, "layer.1": 0 if deep else run.rank}
        outcome = Outcome({"selection": score, "report": score}, [1.0], 10, ranks, 3.0 + 0.01 * run.seed, 0.1)
        results.append(grid, run, outcome)


def test_few_shot_figure_trains_only_what_is_not_stored(tmp_path, monkeypatch, run_python):
    trained = []

    def run_grid(grid, results, progress):
        trained.extend(results.missing(grid))
        store_few_shot_results(grid, results, progress)

    monkeypatch.setitem(sys.modules, "dlnfast.torch.finetune", SimpleNamespace(run_grid=run_grid))
    few = ["--seeds", "3", "--rank-seeds", "2", "--old-seeds", "0", "--ranks", "8", "16"]
    options = [*few, "--published-seeds", "2", "--export", str(tmp_path / "export.jsonl")]
    numbers = run_figure(tmp_path, "deep-lora-fewshot", *options, "--stored", "ignored")["numbers"]
    # Rates: 2 protocols, 2 methods, 4 candidates, 2 seeds. Examples: 2 methods, 3 numbers, 3 and 2 seeds.
    # Ranks: 2 methods at 2 ranks and one at the full width, 2 seeds.
    assert len(trained) == numbers["trained_now"] == 32 + 30 + 10
    assert {run.seed for run in trained[:16]} == {100, 101}
    assert {run.seed for run in trained[16:]} == {0, 1, 2, 100, 101}
    assert numbers["rates"]["package"] == {"lora": 0.01, "deep-lora": 0.01}
    assert [gap["difference"] for gap in numbers["paired"]["package"]] == pytest.approx([0.05] * 3)
    verdicts = {claim["text"]: claim["verdict"] for claim in numbers["claims"]}
    assert verdicts["protocol of the package: Deep LoRA scores higher with 16 examples"] == "shown"
    assert verdicts["published protocol: updates of Deep LoRA have a lower mean rank"] == "shown"
    assert verdicts["one eta: scores of Deep LoRA at r = 8, 16, full are within 0.02"] == "shown"

    (tmp_path / "results").mkdir()
    (tmp_path / "export.jsonl").rename(tmp_path / "results" / "results.jsonl")
    stored = ["--stored", "ignored", "--results", str(tmp_path / "results")]
    out = tmp_path / "without torch"
    arguments = [*few, "--published-seeds", "2", *stored, "--out", out]
    assert "all runs are stored results" in run_python(WITHOUT_TORCH, *arguments)
    again = json.loads((out / "deep-lora-fewshot.json").read_text())["numbers"]
    assert again["trained_now"] == 0
    assert again["rows"] == numbers["rows"]
    trained.clear()
    numbers = run_figure(tmp_path, "deep-lora-fewshot", *few, "--published-seeds", "3", *stored)["numbers"]
    assert len(trained) == numbers["trained_now"] == 6  # one more seed
    assert {run.seed for run in trained} == {2}
    less = [*few, "--published-seeds", "0", *stored]
    numbers = run_figure(tmp_path, "deep-lora-fewshot", *less)["numbers"]
    assert set(numbers["rows"]) == {"package"}
    assert set(numbers["panels"]) == {"package", "differences", "ranks", "norms", "learned"}


def test_few_shot_results_of_the_default_settings_are_shipped(run_python, tmp_path):
    assert deep_lora_fewshot.SHIPPED.stat().st_size < 300_000
    done = run_python(WITHOUT_TORCH, "--out", tmp_path, check=False)
    if done.returncode and "torch" in done.stderr:
        pytest.skip(
            "the trainings of the default settings are not finished: results of some runs are missing"
        )
    assert "all runs are stored results" in done.stdout


def test_quick_changes_nothing_for_a_fast_figure(tmp_path):
    assert main(["figure", "svd-evolution", "--quick", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "svd-evolution.json").read_text())
    assert written["quick"] is False
    assert written["settings"]["steps"] == 50


def test_pictures_are_written_in_several_formats(tmp_path, capsys):
    options = ["--steps", "5", "--format", "svg", "pdf", "png", "svg"]
    run_figure(tmp_path, "svd-evolution", *options)
    assert (tmp_path / "svd-evolution.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in (tmp_path / "svd-evolution.svg").read_text()
    names = [f"svd-evolution.{ending}" for ending in ("svg", "pdf", "png", "json")]
    assert capsys.readouterr().out.rstrip().endswith(", ".join(str(tmp_path / name) for name in names))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_other_formats_replace_the_default(tmp_path):
    command = ["figure", "svd-evolution", "--out", str(tmp_path), "--steps", "5", "--format", "pdf"]
    assert main(command) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".pdf"]


@pytest.mark.parametrize("engine", ["reduced", "dense"])
def test_titles_do_not_name_the_engine(engine):
    module = figures.load("svd-evolution")
    settings = figures.make_settings(module.Settings, {"steps": 3, "engine": engine})
    title = module.draw(settings, module.compute(settings)).get_suptitle()
    assert "engine" not in title
    assert engine not in title


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["figure", "progressive-collapse", "--help"])
    assert "(default: 6 8 10)" in " ".join(capsys.readouterr().out.split())


def test_list_names_the_figures(capsys):
    assert main(["figure", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(figures.FIGURES)


def test_list_makes_no_figure(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["figure", "--list", "svd-evolution"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == list(figures.FIGURES)
    assert captured.err == "dlnfast: --list only names the figures; svd-evolution is not drawn\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_every_figure_describes_its_settings(name):
    module = figures.load(name)
    for option in figures.options(module.Settings):
        assert option.help
        assert option.kind in (int, float, str)
    assert figures.make_settings(module.Settings, {}) == module.Settings()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"colour": 1}, ValueError, "colour is not a setting"),
        ({"dim": 1.5}, TypeError, "dim is 1.5"),
        ({"scale": -1.0}, ValueError, "scale is -1"),
        ({"inputs": "grey"}, ValueError, "inputs is 'grey'; wanted one of 'white', 'gaussian'"),
    ],
)
def test_errors_name_wrong_settings(values, error, message):
    with pytest.raises(error, match=message):
        figures.make_settings(figures.load("svd-evolution").Settings, values)


def test_wrong_lists_and_names_are_refused():
    with pytest.raises(ValueError, match="depths is empty"):
        figures.make_settings(figures.load("progressive-collapse").Settings, {"depths": ()})
    with pytest.raises(ValueError, match="figure is 'mona-lisa'; wanted one of 'svd-evolution'"):
        figures.load("mona-lisa")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "4"], "layer is 4; wanted 1 .. 3"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--rank", "40"], "rank is 40"),
        (["--engine", "reduced", "--inputs", "gaussian"], "engine='reduced' does not hold here"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, options, message):
    assert main(["figure", "svd-evolution", "--out", str(tmp_path), *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dlnfast: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples-per-class", "1"], "samples_per_class is 1; wanted an integer of at least 2"),
        (["--runs", "0"], "runs is 0; wanted an integer of at least 1"),
    ],
)
def test_errors_name_bad_options_of_collapse(tmp_path, capsys, options, message):
    assert main(["figure", "progressive-collapse", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "0"],
        ["--steps", "0"],
        ["--rank", "20"],
        ["--dim", "2", "--rank", "1"],
        ["--scale", "0"],
        ["--depth", "1"],
    ],
)
def test_evolution_in_extreme_settings(tmp_path, options):
    numbers = run_figure(tmp_path, "svd-evolution", *options)["numbers"]
    assert np.isfinite(numbers["loss"]).all()


def test_a_figure_that_diverges_is_an_error(tmp_path, capsys):
    assert main(["figure", "svd-evolution", "--out", str(tmp_path), "--learning-rate", "1e4"]) == 1
    assert "the loss is not finite at step" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["figure"],
        ["figure", "mona-lisa"],
        ["figure", "svd-evolution", "--dim", "x"],
    ],
)
def test_errors_name_unknown_figures(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as leaving:  # argparse's own
        status = leaving.code
    assert status == 2
    assert capsys.readouterr().err
