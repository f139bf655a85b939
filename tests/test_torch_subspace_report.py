# SPDX-License-Identifier: MIT
"""Reports on whether layers learned in small subspaces."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import dlnfast.torch as dt  # noqa: E402
from dlnfast.torch.subspace_report import _judge  # noqa: E402

WIDTH = 48


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(width=WIDTH):
    return nn.Sequential(
        nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def low_rank(rank, rows=WIDTH, columns=WIDTH, size=0.5):
    return size * torch.randn(rows, rank) @ torch.randn(rank, columns) / math.sqrt(rank)


class Agreement:
    """Share of the labels of the final network that a network gives; 1 for the final one."""

    def __init__(self, model):
        self.inputs = torch.randn(400, 20)
        self.labels = model(self.inputs).argmax(1)

    def __call__(self, model):
        return float((model(self.inputs).argmax(1) == self.labels).float().mean())


def changed(rank, noise=0.0):
    model = network()
    start = copy_of(model)
    with torch.no_grad():
        model[2].weight.add_(low_rank(rank) + noise * torch.randn(WIDTH, WIDTH))
    return model, start


def test_a_change_of_low_rank_is_found():
    model, start = changed(2)
    report = dt.subspace_report(model, start, rank=2, layers="2", evaluate=Agreement(model))
    layer = report.layers["2"]
    assert layer.learns_in_subspace
    assert layer.share[4] == pytest.approx(1.0, abs=1e-9)
    assert layer.scores[2] == layer.scores[4] == report.score == 1.0
    assert layer.scores[0] < 0.9
    assert layer.scores_without[2] == layer.scores[0]
    assert layer.turn < 1e-3 < layer.random_turn
    assert "learned in a small subspace. " in layer.verdict
    assert "2 (48 x 48)" in layer.verdict
    assert str(report) == layer.verdict


def test_a_change_of_high_rank_is_found():
    model, start = changed(40)
    report = dt.subspace_report(model, start, rank=2, layers="2", evaluate=Agreement(model), ranks=[1, 40])
    layer = report.layers["2"]
    assert layer.learns_in_subspace is False
    assert "did not learn in 4 directions" in layer.verdict
    assert sorted(layer.scores) == [0, 1, 4, 40]
    assert layer.scores[40] == 1.0


def test_shares_are_those_of_lapack():
    model, start = changed(5, noise=0.1)
    change = (model[2].weight.detach() - start["2.weight"]).double()
    values = torch.linalg.svdvals(change).numpy()
    layer = dt.subspace_report(model, start, rank=3, layers="2").layers["2"]
    for k, share in layer.share.items():
        assert share == pytest.approx(np.sum(values[:k] ** 2) / np.sum(values**2), rel=1e-9)
    assert layer.relative_change == pytest.approx(float(change.norm() / start["2.weight"].double().norm()))
    random = np.linalg.svd(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)), compute_uv=False)
    assert layer.random_share[6] == pytest.approx(np.sum(random[:6] ** 2) / np.sum(random**2), rel=0.15)


def test_without_scores_there_is_no_verdict():
    model, start = changed(2)
    report = dt.subspace_report(model, start, rank=2, layers="2")
    assert report.layers["2"].learns_in_subspace is None
    assert "without evaluate this does not show" in str(report)
    with pytest.raises(ValueError, match="evaluate was not given"):
        report.display()


@pytest.mark.parametrize(
    ("rank", "text"), [(8, "2K = 16 directions are 33 % of the smaller side 48"), (2, "alone hardly matters")]
)
def test_questions_without_an_answer_are_refused(rank, text):
    model, start = changed(1)
    report = dt.subspace_report(model, start, rank=rank, layers="2", evaluate=lambda model: 1.0)
    assert report.layers["2"].learns_in_subspace is None
    assert text in report.layers["2"].verdict
    same = dt.subspace_report(model, copy_of(model), rank=2, layers="2", evaluate=lambda model: 1.0)
    assert "has not changed" in same.layers["2"].verdict


def test_a_change_of_which_each_part_is_enough_is_no_evidence():
    model, start = changed(10, noise=1.0)
    scores = iter([1.0, 0.0, *[1.0] * 50])
    report = dt.subspace_report(model, start, rank=2, layers="2", evaluate=lambda model: next(scores))
    assert report.layers["2"].learns_in_subspace is None
    assert "Each of both parts of the change is enough" in report.layers["2"].verdict


@pytest.mark.parametrize(("n_samples", "learns"), [(400, True), (20, None)])
def test_few_samples_give_no_verdict(n_samples, learns):
    """The scores of 400 samples show that the gain is kept, those of 20 do not."""
    model, start = changed(2, noise=0.02)
    agreement = Agreement(model)

    def evaluate(model):
        return (model(agreement.inputs).argmax(1) == agreement.labels)[:n_samples]

    layer = dt.subspace_report(model, start, rank=2, layers="2", evaluate=evaluate, kept=0.85).layers["2"]
    assert layer.learns_in_subspace is learns
    assert ("samples are too few" in layer.verdict) == (learns is None)
    with torch.no_grad():
        full = evaluate(model).double().numpy()
    least = layer.scores[0] + 0.85 * (full.mean() - layer.scores[0])
    assert layer.margin == pytest.approx(layer.scores[4] - least)
    assert layer.margin_error == pytest.approx(0.4 / math.sqrt(n_samples), rel=1)


def test_a_change_that_is_alike_on_shuffled_labels_is_no_evidence():
    model, start = changed(2, noise=0.01)
    evaluate = Agreement(model)
    for rank, learns in ((1, None), (40, True)):
        shuffled = network()
        shuffled.load_state_dict(start)
        with torch.no_grad():
            shuffled[2].weight.add_(low_rank(rank))
        report = dt.subspace_report(model, start, rank=2, layers="2", evaluate=evaluate, shuffled=shuffled)
        assert report.layers["2"].learns_in_subspace is learns
        assert ("need not be an effect of what there is to learn" in str(report)) == (learns is None)
    alone = dt.subspace_report(model, start, rank=2, layers="2", evaluate=evaluate)
    assert alone.layers["2"].margin is None
    assert "not compared with shuffled labels" in str(alone)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([(3, 3)], r"an array of shape \(3, 3\)"),
        ([(0,)], "wanted a finite number"),
        ([(5,), (4,)], "4 scores after 5"),
    ],
)
def test_scores_of_samples_are_checked(sizes, text):
    model, start = changed(2)
    scores = iter([torch.ones(size) for size in sizes])
    with pytest.raises(ValueError, match=text):
        dt.subspace_report(model, start, rank=2, layers="2", evaluate=lambda model: next(scores))


def test_layers_are_cut_one_by_one_and_together():
    model = network()
    start = copy_of(model)
    with torch.no_grad():
        model[0].weight.add_(low_rank(1, WIDTH, 20))
        model[2].weight.add_(low_rank(1))
    seen = []

    def evaluate(model):
        seen.append((model[0].weight.detach().clone(), model[2].weight.detach().clone()))
        return float(len(seen))

    ends = copy_of(model)
    report = dt.subspace_report(model, start, rank=1, layers=["0", "2"], evaluate=evaluate, ranks=[1])
    assert list(report.joint_scores) == [0, 1, 2]
    # The trained model; layer 0 with 0, 1, 2 values, and without 1, 2; layer 2 alike; both.
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(seen[0][0], ends["0.weight"], rtol=0, atol=0)
    torch.testing.assert_close(seen[1][0], start["0.weight"], **close)
    torch.testing.assert_close(seen[1][1], ends["2.weight"], rtol=0, atol=0)
    torch.testing.assert_close(seen[2][0], ends["0.weight"], **close)
    torch.testing.assert_close(seen[4][0], start["0.weight"], **close)
    torch.testing.assert_close(seen[6][0], ends["0.weight"], rtol=0, atol=0)
    torch.testing.assert_close(seen[11][0], start["0.weight"], **close)
    torch.testing.assert_close(seen[11][1], start["2.weight"], **close)
    assert len(seen) == 1 + 2 * 5 + 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ends[name])
    figure = report.display().plot()
    assert [line.get_label() for line in figure.ax_.lines][:3] == ["0", "2", "all of them"]
    assert [row["name"] for row in report.table()] == ["0", "2"]
    assert (
        "all 2 layers together: at their start the score is 12, with 2 directions of each change 14"
        in str(report)
    )


def test_the_plot_shows_all_ranks_of_the_wide_layers():
    model = network()
    start = copy_of(model)
    with torch.no_grad():
        for i, rows in ((2, WIDTH), (4, 3)):
            model[i].weight.add_(low_rank(2, rows=rows))
    report = dt.subspace_report(model, start, rank=2, layers=["4", "2"], evaluate=Agreement(model))
    report = dataclasses.replace(report, layers={name: report.layers[name] for name in ("4", "2")})
    narrow, wide = report.display().plot().ax_.lines[:2]
    assert list(wide.get_xdata()) == [0, 1, 2, 4, 8, 16]
    assert list(wide.get_ydata()) == list(report.layers["2"].scores.values())
    assert np.isfinite(narrow.get_ydata()).tolist() == [True, True, True, False, False, False]


def test_consecutive_changes_are_coupled_through_their_common_space():
    model = network()
    start = copy_of(model)
    u = torch.linalg.qr(torch.randn(WIDTH, 2))[0]
    with torch.no_grad():
        model[0].weight.add_(u @ torch.randn(2, 20))
        model[2].weight.add_(torch.randn(WIDTH, 2) @ u.T)
    report = dt.subspace_report(model, start, rank=1, layers=["0", "2"])
    assert report.layers["0"].coupling == pytest.approx(1.0)
    assert report.layers["0"].random_coupling == pytest.approx(2 / WIDTH)
    assert report.layers["2"].coupling is None


def test_trackers_and_shuffled_labels():
    model = network()
    start = copy_of(model)
    shuffled = network()
    shuffled.load_state_dict(start)
    with torch.no_grad():
        shuffled[2].weight.add_(low_rank(30))
    inputs, labels = torch.randn(64, 20), torch.randint(3, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with dt.track(model, ["0", "2"], k=4, every=5) as tracked:
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    one = dt.subspace_report(tracked, rank=2, shuffled=shuffled)
    other = dt.subspace_report(model, start, rank=2, layers=["0", "2"], shuffled=shuffled)
    for name in ("0", "2"):
        assert one.layers[name].share == pytest.approx(other.layers[name].share)
    assert one.layers["0"].shuffled_share == dict.fromkeys(one.layers["0"].share, 0.0)
    assert 0 < one.layers["2"].shuffled_share[4] < one.layers["2"].share[4]
    assert "shuffled labels" in one.layers["2"].verdict
    with pytest.raises(ValueError, match="those of the tracker"):
        dt.subspace_report(tracked, start, rank=2)
    with dt.track(model, "0", k=2, every=1, change=False) as without:
        optimizer.step()
    with pytest.raises(ValueError, match="change=False"):
        dt.subspace_report(without, rank=2)
    del model, optimizer, other
    import gc

    gc.collect()
    with pytest.raises(RuntimeError, match="does not exist any more"):
        _ = tracked.model


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"start": None}, ValueError, "start is needed"),
        ({"start": 3}, TypeError, "start is int"),
        ({"start": {"0.weight": torch.ones(2, 2)}}, ValueError, "start does not fit the model"),
        ({"start": network(20)}, ValueError, "start: layer '0' is 20 x 20; wanted 48 x 20"),
        ({"shuffled": nn.Linear(3, 3)}, ValueError, "shuffled: layer '0' is missing"),
        ({"shuffled": 3}, TypeError, "shuffled is int"),
        ({"rank": 0}, ValueError, "rank"),
        ({"ranks": [0]}, ValueError, r"ranks\[0\]"),
        ({"kept": 1.5}, ValueError, "kept"),
        ({"least_gain": -0.1}, ValueError, "least_gain"),
        ({"largest_part": 0.0}, ValueError, "largest_part"),
        ({"evaluate": 0.9}, TypeError, "evaluate is float; wanted a function"),
        ({"evaluate": lambda model: None}, TypeError, "evaluate returned None; wanted a number"),
        ({"evaluate": lambda model: {"accuracy": 1.0}}, TypeError, "evaluate returned {'accuracy'"),
        ({"evaluate": lambda model: math.nan}, ValueError, "evaluate returned nan"),
        ({"layers": "nothing"}, ValueError, "'nothing' fits none"),
    ],
)
def test_bad_input_is_refused(change, error, text):
    model, start = changed(2)
    ends = copy_of(model)
    arguments = {"start": start, "rank": 2, "layers": ["0", "2"]} | change
    with pytest.raises(error, match=text):
        dt.subspace_report(model, **arguments)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ends[name])


def test_scores_are_taken_in_evaluation_mode_and_the_mode_is_restored():
    model, start = changed(2)
    model.train()
    agreement, modes = Agreement(model), []

    def evaluate(model):
        modes.append(model.training)
        model.eval()
        return agreement(model)

    dt.subspace_report(model, start, rank=2, layers="2", evaluate=evaluate)
    assert not any(modes)
    assert all(module.training for module in model.modules())


def test_a_score_that_falls_is_named():
    model, start = changed(2)
    agreement = Agreement(model)
    report = dt.subspace_report(
        model, start, rank=2, layers="2", evaluate=lambda model: 1.0 + 1.0 - agreement(model)
    )
    assert report.layers["2"].learns_in_subspace is None
    assert "a score has to be larger for a better model" in report.layers["2"].verdict


def test_a_rank_is_needed_from_which_on_the_gain_is_kept():
    """Scores need not grow with the rank: a lucky one below 2K is not what is needed."""
    model, start = changed(2)
    layer = dt.subspace_report(model, start, rank=2, layers="2", evaluate=Agreement(model)).layers["2"]
    scores = {0: 0.0, 1: 1.0, 2: 0.5, 4: 0.5, 8: 1.0, 16: 0.2}
    odd = dataclasses.replace(layer, scores=scores, scores_without=dict.fromkeys(scores, 0.0))
    assert "more than 16 are needed" in judge(odd)
    assert "16 are needed" in judge(dataclasses.replace(odd, scores=scores | {16: 1.0, 8: 0.2}))
    found = judge(dataclasses.replace(odd, scores=scores | {4: 1.0}))
    assert "learned in a small subspace. 4 directions are enough" in found


def judge(layer):
    return _judge(layer, 2, 1.0, 0.95, 0.05, 0.25)[1]


def test_a_failing_score_leaves_the_model_as_it_was():
    model, start = changed(2)
    ends, calls = copy_of(model), []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("data")
        return 1.0 / len(calls)

    with pytest.raises(KeyError):
        dt.subspace_report(model, start, rank=2, layers="2", evaluate=evaluate)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ends[name])


def test_changes_that_are_not_finite_are_named():
    model, start = changed(2)
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="change of layer '2' is not finite"):
        dt.subspace_report(model, start, rank=2, layers="2")
    with pytest.raises(TypeError, match="trained is int"):
        dt.subspace_report(3, start, rank=2)
