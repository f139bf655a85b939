# SPDX-License-Identifier: MIT
"""`track`: correct singular values for all training loops and types of weights."""

from __future__ import annotations

import copy
import gc
import re
import sys
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from tolerances import tolerance  # noqa: E402
from torch import nn  # noqa: E402

import dlnfast as dln  # noqa: E402
from dlnfast.torch import track  # noqa: E402

track_module = sys.modules["dlnfast.torch.track"]


def small_model(seed=0, dtype=torch.float64, widths=(12, 30, 20, 3)):
    torch.manual_seed(seed)
    layers = []
    for rows, columns in zip(widths[1:], widths[:-1], strict=True):
        layers += [nn.Linear(columns, rows), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 12, generator=generator, dtype=torch.float64).to(dtype)


def run_steps(model, optimizer, n, after=None):
    inputs = data(next(model.parameters()).dtype)
    for _ in range(n):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        if after is not None:
            after(loss)


def snapshots(model, optimizer, n, every, names):
    """Train, and return copies of the weights at the steps of the records."""
    copies = [{name: model.get_submodule(name).weight.detach().clone() for name in names}]
    steps = [0]

    def after(loss):
        steps[0] += 1
        if steps[0] % every == 0 or steps[0] == n:
            copies.append({name: model.get_submodule(name).weight.detach().clone() for name in names})

    run_steps(model, optimizer, n, after)
    return copies


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("of", ["weights", "change"])
def test_records_are_the_singular_values(dtype, of):
    model = small_model(dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    with track(model, k=3, every=4) as tracked:
        copies = snapshots(model, optimizer, 10, 4, ["0", "2", "4"])
    run = tracked.trajectory(of)
    assert run.steps.tolist() == [0, 4, 8, 10]
    assert run.layer_names == ["0", "2", "4"]
    assert run.shapes == [(30, 12), (20, 30), (3, 20)]
    for number, name in enumerate(run.layer_names, 1):
        values, errors = run.singular_values(name), run.singular_value_errors(number)
        assert values.dtype == (np.float64 if dtype == torch.float64 else np.float32)
        for record, weights in enumerate(copies):
            matrix = weights[name].double()
            if of == "change":
                matrix = matrix - copies[0][name].double()
            exact = torch.linalg.svdvals(matrix).numpy()[:3]
            # The error of a difference of float32 weights is a rounding of the weights' size.
            scale = float(torch.linalg.norm(copies[0][name].double()))
            eps = tolerance(values.dtype, max(matrix.shape))
            assert np.all(np.abs(values[record] - exact) <= errors[record] + eps * scale)


def test_all_values_of_a_layer_can_be_tracked():
    model = small_model()
    with track(model, "penultimate", k="all") as tracked:
        pass
    exact = np.linalg.svd(model[2].weight.detach().numpy(), compute_uv=False)
    np.testing.assert_allclose(tracked.trajectory().singular_values(1)[0], exact, rtol=tolerance(float, 30))


def test_tracking_a_deep_linear_network_equals_train(tmp_path):
    """The numbers of `train`, with the same trajectory, plots and files."""
    problem = dln.low_rank_recovery(24, 2, seed=3)
    weights = dln.orthogonal([24] * 4, seed=3)
    steps = 40
    run = dln.train(
        problem, weights, learning_rate=2.0, steps=steps, engine="dense", record=dln.Record(every=10)
    )
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False, dtype=torch.float64) for _ in range(3)))
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
    target = torch.from_numpy(np.array(problem.target_factors().dense()))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    with track(model, k="all", every=10) as tracked:
        for _ in range(steps):
            optimizer.zero_grad()
            product = model[2].weight @ model[1].weight @ model[0].weight
            loss = problem.loss_scale / 2 * (product - target).square().sum()
            tracked.log_loss(loss)
            loss.backward()
            optimizer.step()
    seen = tracked.trajectory()
    assert seen.steps.tolist() == run.steps.tolist()
    np.testing.assert_allclose(seen.loss, run.loss[:-1], rtol=1e3 * tolerance(float, 24, steps))
    for layer in (1, 2, 3):
        # Steps amplify roundings by up to the growth of the singular values.
        np.testing.assert_allclose(
            seen.singular_values(layer), run.singular_values(layer), atol=10 * tolerance(float, 24, steps)
        )
    changes = tracked.trajectory(of="change")
    values = changes.singular_values(2)[-1]
    scale = float(run.singular_values(2)[-1, -10])
    # W - W(0) is (rho / eps - 1) W(0) and a matrix of rank 2r.
    assert np.sum(np.abs(values - (1 - scale)) <= 10 * tolerance(float, 24, steps)) == 24 - 2 * 2

    seen.save(tmp_path / "seen.npz")
    again = dln.load(tmp_path / "seen.npz")
    assert again.is_tracked
    assert again.outcome is None
    assert type(again.states) is type(seen.states)
    assert again.layer_names == ["0", "1", "2"]
    np.testing.assert_array_equal(again.loss_steps, seen.loss_steps)
    np.testing.assert_array_equal(again.singular_values("1"), seen.singular_values(2))
    np.testing.assert_array_equal(again.angles("1"), seen.angles(2))
    np.testing.assert_array_equal(again.block_angles("1", "left"), seen.block_angles(2, side="left"))


def test_plots_accept_tracked_runs():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with track(model, k=2, every=1) as tracked:
        run_steps(model, optimizer, 3, lambda loss: tracked.log_loss(loss, tracked.step - 1))
    run = tracked.trajectory()
    assert len(dln.plots.SingularValueDisplay.from_trajectory(run, "2").numbers()["top"]["values"]) == 2
    assert dln.plots.AngleDisplay.from_trajectory(run, 1).numbers()["side"] == "right"
    assert dln.plots.LossDisplay.from_trajectory(run).numbers()["loss"] == run.loss.tolist()
    with pytest.raises(ValueError, match="run has no losses"):
        dln.plots.LossDisplay.from_trajectory(track(model).trajectory())


def test_angles_refer_to_the_start():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = model[0].weight.detach().clone()
    with track(model, "0", k=3, every=5) as tracked:
        run_steps(model, optimizer, 5)
    then, now = (np.linalg.svd(w.numpy()) for w in (start, model[0].weight.detach()))
    run = tracked.trajectory()
    wanted = dln.measures.vector_angles(now[2][:3].T, then[2][:3].T, rank=3)
    # The error of vectors is rounding divided by their gaps.
    np.testing.assert_allclose(run.angles("0")[-1], wanted, atol=1e3 * tolerance(float, 30))
    block = dln.measures.subspace_angles(now[0][:, :3], then[0][:, :3])[-1]
    assert run.block_angles("0", "left")[-1] == pytest.approx(block, abs=1e3 * tolerance(float, 30))
    assert not run.angles("0")[0].any()
    with pytest.raises(ValueError, match="its own reference only"):
        run.angles("0", reference="first_step")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_float32(dtype):
    model = small_model(dtype=torch.float32).to(dtype)
    with track(model, "2", k=4) as tracked:
        with torch.no_grad():
            model[2].weight.add_(0.5)
        tracked.step += 1
    run = tracked.trajectory()
    assert run.singular_values(1).dtype == np.float32
    exact = torch.linalg.svdvals(model[2].weight.detach().float()).numpy()[:4]
    assert np.all(np.abs(run.singular_values(1)[-1] - exact) <= run.singular_value_errors(1)[-1] + 1e-5)


def test_tracking_by_products_gives_the_same_values(monkeypatch):
    """Products by PyTorch instead of whole matrices, as for a CUDA tensor."""
    runs = []
    for on_device in (False, True):
        model = small_model(widths=(90, 80, 70, 3))
        if on_device:
            monkeypatch.setattr(
                dln.torch.SpectralTracker,
                "_update",
                lambda self, *arguments: self._update_by_products(*arguments),
            )
        with track(model, k=3, every=1) as tracked:
            with torch.no_grad():
                model[2].weight.add_(torch.outer(torch.ones(80), torch.ones(90))[:70, :80].to(torch.float64))
            tracked.advance()
        runs.append(tracked.trajectory())
    for layer in (1, 2, 3):
        gap = np.abs(runs[0].singular_values(layer) - runs[1].singular_values(layer))
        assert np.all(gap <= runs[0].singular_value_errors(layer) + runs[1].singular_value_errors(layer))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_tensors_are_tracked_on_their_device():
    model = small_model(dtype=torch.float32).cuda()
    with track(model, k=3, every=1) as tracked:
        with torch.no_grad():
            model[2].weight.mul_(2)
        tracked.advance()
    exact = torch.linalg.svdvals(model[2].weight.detach().double()).cpu().numpy()[:3]
    run = tracked.trajectory()
    assert np.all(np.abs(run.singular_values("2")[-1] - exact) <= run.singular_value_errors("2")[-1] + 1e-5)


# ------------------------------------------------------------------------------------------ the hook


def test_only_optimizers_of_tracked_weights_count():
    model, other = small_model(), small_model(1)
    own_optimizer, other_optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, other))
    tracked = track(model, every=2)
    run_steps(other, other_optimizer, 3)
    assert tracked.step == 0
    run_steps(model, own_optimizer, 3)
    run_steps(other, other_optimizer, 1)
    assert tracked.step == 3
    tracked.close()
    run_steps(model, own_optimizer, 2)
    assert tracked.step == 3
    assert tracked.trajectory().steps.tolist() == [0, 2, 3]
    tracked.close()
    assert tracked.trajectory().steps.tolist() == [0, 2, 3]


def test_the_counted_optimizer_can_be_chosen():
    model = small_model()
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model[0], model[2]))
    by_default, named = track(model), track(model, optimizer=second)
    run_steps(model, first, 2)
    run_steps(model, second, 3)
    assert (by_default.step, named.step) == (5, 3)
    by_default.close()
    named.close()


def test_a_deleted_tracker_removes_its_hooks():
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    gc.collect()  # trackers of other tests
    before = len(hooks)
    tracked = track(small_model())
    assert len(hooks) == before + 1
    del tracked
    gc.collect()
    assert len(hooks) == before


def test_a_failed_record_is_not_stored():
    model = small_model()
    tracked = track(model, every=1)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 2 at step 1"):
        tracked.advance()
    run = tracked.trajectory()
    assert [len(run.singular_values(layer)) for layer in (1, 2, 3)] == [1, 1, 1]
    error = RuntimeError("training failed")
    with pytest.raises(RuntimeError, match="training failed"), tracked:
        raise error
    assert tracked.trajectory().steps.tolist() == [0]


def test_resumed_tracking_continues_the_records(tmp_path):
    names = ["0", "2", "4"]
    whole, halves = small_model(), small_model()
    with track(whole, k=3, every=2) as one:
        run_steps(whole, torch.optim.SGD(whole.parameters(), lr=0.5), 12, one.log_loss)
    first = track(halves, k=3, every=2)
    run_steps(halves, torch.optim.SGD(halves.parameters(), lr=0.5), 5, first.log_loss)
    torch.save({"model": halves.state_dict(), "tracker": first.state_dict()}, tmp_path / "checkpoint.pt")
    first._monitor.remove()

    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again = small_model(seed=9)
    again.load_state_dict(state["model"])
    second = track(again, k=3, every=2)
    second.load_state_dict(state["tracker"])
    assert second.step == 5
    run_steps(again, torch.optim.SGD(again.parameters(), lr=0.5), 7, second.log_loss)
    second.close()
    for of in ("weights", "change"):
        left, right = one.trajectory(of), second.trajectory(of)
        assert left.steps.tolist() == right.steps.tolist()
        np.testing.assert_array_equal(left.loss, right.loss)
        for name in names:
            assert left.branches(name).tolist() == right.branches(name).tolist()
            slack = left.singular_value_errors(name) + right.singular_value_errors(name)
            assert np.all(np.abs(left.singular_values(name) - right.singular_values(name)) <= slack)
            np.testing.assert_allclose(left.angles(name), right.angles(name), atol=1e-6)


def test_states_of_other_trackers_are_refused():
    model = small_model()
    state = track(model, k=2).state_dict()
    with pytest.raises(ValueError, match=re.escape("state was taken with k 2; this tracker has 3")):
        track(model, k=3).load_state_dict(state)
    with pytest.raises(ValueError, match="state was taken with layers"):
        track(model, "0", k=2).load_state_dict(state)
    with pytest.raises(ValueError, match="tracked matrices"):
        track(model, k=2, change=False).load_state_dict(state)
    with pytest.raises(ValueError, match="version 99"):
        track(model, k=2).load_state_dict({**state, "version": 99})


@pytest.mark.parametrize("large", [False, True])
def test_records_do_not_depend_on_the_number_of_threads(monkeypatch, large):
    if large:
        monkeypatch.setattr(sys.modules["dlnfast.torch.track"], "_LARGE", 30 * 20)
    runs = []
    for n_threads in (0, 1, 2, 5):
        model = small_model()
        with track(model, k=3, every=2, n_threads=n_threads) as tracked:
            run_steps(model, torch.optim.SGD(model.parameters(), lr=0.5), 8)
        assert not tracked._buffers
        runs.append(tracked)
    for of in ("weights", "change"):
        first, *others = (tracked.trajectory(of) for tracked in runs)
        for run in others:
            for layer in (1, 2, 3):
                np.testing.assert_array_equal(run.singular_values(layer), first.singular_values(layer))
                np.testing.assert_array_equal(run.angles(layer), first.angles(layer))


@pytest.mark.parametrize("n_threads", [1, 3])
def test_an_error_names_the_first_layer_that_is_not_finite(n_threads):
    model = small_model()
    tracked = track(model, k=2, every=1, n_threads=n_threads)
    with torch.no_grad():
        for layer in (model[4], model[2]):
            layer.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="layer 2 at step 1"):
        tracked.advance()
    assert tracked.trajectory().steps.tolist() == [0]


def test_tied_weights_are_tracked_once():
    model = small_model(widths=(12, 12, 12))
    model[2].weight = model[0].weight
    tracked = track(model, k=2)
    assert [m.name for m in tracked.matrices] == ["0"]
    assert tracked.trajectory().config["aliases"] == [["2"]]


def test_errors_name_the_invalid_setting():
    model = small_model()
    for keywords, text in (
        ({"k": 0}, "k is 0"),
        ({"every": 0}, "every is 0"),
        ({"tolerance": -1.0}, "tolerance is -1"),
        ({"n_threads": -1}, "n_threads is -1"),
    ):
        with pytest.raises(ValueError, match=text):
            track(model, **keywords)
    tracked = track(model, change=False)
    with pytest.raises(ValueError, match="not tracked because of change=False"):
        tracked.trajectory(of="change")
    run = tracked.trajectory()
    with pytest.raises(ValueError, match=r"run\.shapes"):
        _ = run.widths
    with pytest.raises(ValueError, match="the model has them"):
        run.weights(1)
    with pytest.raises(ValueError, match="layer is '9'"):
        run.singular_values("9")
    with pytest.raises(ValueError, match="no target"):
        _ = run.rank
    with pytest.raises(ValueError, match="belongs to tracked models"):
        dln.train(
            dln.low_rank_recovery(8, 1), dln.orthogonal([8] * 3), learning_rate=1.0, steps=1, engine="dense"
        ).block_angles(1)


def test_angles_of_unresolved_vectors_refer_to_the_start():
    """The bounds do not resolve the gaps of random spectra, but angles of their vectors are recorded."""
    model = small_model(widths=(300, 300, 3))
    start = np.linalg.svd(model[0].weight.detach().numpy())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    torch.manual_seed(5)
    inputs = torch.randn(16, 300, dtype=torch.float64)
    with track(model, "0", k=4, every=5) as tracked:
        for _ in range(10):
            optimizer.zero_grad()
            (model(inputs) - 1).square().sum().backward()
            optimizer.step()
    run = tracked.trajectory()
    assert run.config["reference_steps"] == [0]
    assert tracked.trajectory(of="change").config["reference_steps"] == [5]
    now = np.linalg.svd(model[0].weight.detach().numpy())
    wanted = dln.measures.vector_angles(now[2][:4].T, start[2][:4].T, rank=4)
    assert wanted.max() > 0.1
    # The vectors of the record are those of the tracker, with an error of a few per cent.
    np.testing.assert_allclose(run.angles("0")[-1], wanted, atol=0.1)


def test_angles_of_isometries_refer_to_a_later_record():
    model = nn.Sequential(nn.Linear(20, 20, bias=False, dtype=torch.float64))
    dln.torch.orthogonal_(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with track(model, k=3, every=1) as tracked:
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.ones(1, 20, dtype=torch.float64)) - 3).square().sum().backward()
            optimizer.step()
    assert tracked.trajectory().config["reference_steps"] == [1]


def test_weights_that_cannot_be_tracked_are_refused():
    model = small_model()
    other = torch.optim.SGD(small_model(1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer holds none of the chosen weights"):
        track(model, optimizer=other)
    with pytest.raises(TypeError, match="optimizer is str"):
        track(model, optimizer="sgd")
    with pytest.raises(TypeError, match=r"layer weight is torch\.complex64"):
        track(nn.Linear(3, 3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="change is 'yes'"):
        track(model, change="yes")
    with pytest.raises(TypeError, match="k is None; wanted a number of singular values, or"):
        track(model, k=None)


def test_states_of_other_weights_are_refused():
    model = small_model()
    state = track(model, k=2).state_dict()
    with pytest.raises(ValueError, match="load the model's weights first"):
        track(small_model(4), k=2).load_state_dict(state)
    for wrong, error in (({}, ValueError), ({"a": 1}, ValueError), (None, TypeError), (5, TypeError)):
        with pytest.raises(error, match="wanted a dict from state_dict"):
            track(model, k=2).load_state_dict(wrong)


def test_a_weight_that_is_not_finite_raises_one_error():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with track(model, every=1) as tracked:
        with torch.no_grad():
            model[0].weight[0, 0] = float("inf")
        with pytest.raises(ValueError, match="layer 0 at step 1"):
            run_steps(model, optimizer, 2)
    assert tracked.trajectory().steps.tolist() == [0]


def test_weights_can_be_changed_without_an_optimizer():
    model = small_model()
    with track(model, "0", k=2, every=1) as tracked:
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        tracked.advance()
    values = tracked.trajectory().singular_values("0")
    np.testing.assert_allclose(values[1], 2 * values[0], rtol=tolerance(float, 30))


def test_tracked_models_can_be_copied():
    model = small_model()
    tracked = track(model)
    assert copy.deepcopy(model)[0].weight.equal(model[0].weight)
    assert "SpectralTracker(3 layers, 0 steps, 1 records)" in repr(tracked)
    assert "tracked, 3 layers" in repr(tracked.trajectory())


class TestBackground:
    """Records that a thread computes during the next steps."""

    @staticmethod
    def train_both(make, n_steps, every, **settings):
        """Return the trackers of two equal trainings, without and with the background."""
        found = []
        for background in (False, True):
            model = make()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
            with track(model, every=every, background=background, **settings) as tracked:
                run_steps(model, optimizer, n_steps)
            found.append(tracked)
        return found

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("every", [1, 4])
    def test_records_are_the_same(self, dtype, every):
        plain, background = self.train_both(lambda: small_model(dtype=dtype), 10, every, k=3, vectors=True)
        for of in ("weights", "change"):
            one, other = plain.trajectory(of), background.trajectory(of)
            assert one.steps.tolist() == other.steps.tolist()
            for name in one.layer_names:
                assert np.array_equal(one.singular_values(name), other.singular_values(name))
                assert np.array_equal(one.singular_value_errors(name), other.singular_value_errors(name))
                assert np.array_equal(one.angles(name), other.angles(name))
        assert background.background_seconds > 0
        assert plain.background_seconds == 0

    def test_products_are_the_same(self, monkeypatch):
        monkeypatch.setattr(track_module, "is_decomposed", lambda shape, k: False)
        monkeypatch.setattr(track_module, "_is_on_host", lambda matrix: False)
        plain, background = self.train_both(small_model, 6, 2, k=2)
        for of in ("weights", "change"):
            one, other = plain.trajectory(of), background.trajectory(of)
            for name in one.layer_names:
                assert np.array_equal(one.singular_values(name), other.singular_values(name))

    def test_a_record_has_the_weights_of_its_step(self, monkeypatch):
        """The thread starts when the weights have changed already."""
        model = small_model()
        weight = model[0].weight.detach().clone()
        changed = threading.Event()
        update = track_module.SpectralTracker._update_trackers

        def wait(self, *arguments):
            assert changed.wait(60)
            return update(self, *arguments)

        changed.set()
        tracked = track(model, "0", k=3, change=False, background=True)
        monkeypatch.setattr(track_module.SpectralTracker, "_update_trackers", wait)
        changed.clear()
        for step in (1, 2):
            tracked.advance()
            with torch.no_grad():
                model[0].weight.mul_(2)
            if step == 1:
                tracked.record()
                assert tracked._pending is not None
                assert repr(tracked).endswith("2 records)")
                with torch.no_grad():
                    model[0].weight.zero_()
                changed.set()
        values = tracked.trajectory().singular_values("0")
        exact = torch.linalg.svdvals(weight).numpy()[:3]
        np.testing.assert_allclose(values[:2], [exact, 2 * exact], rtol=tolerance(float, 30))

    def test_a_weight_that_is_not_finite_is_an_error_of_the_next_record(self):
        model = small_model()
        tracked = track(model, k=2, every=1, background=True)
        with torch.no_grad():
            model[2].weight[0, 0] = torch.nan
        tracked.advance()
        with pytest.raises(ValueError, match=r"layer 2 at step 1: .* not finite"):
            tracked.trajectory()
        assert tracked.trajectory().steps.tolist() == [0]
        tracked.close()

    def test_weights_that_are_not_finite_at_the_start_are_refused_at_once(self):
        model = small_model()
        with torch.no_grad():
            model[2].weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match="layer 2 at step 0"):
            track(model, k=2, background=True)

    def test_states_include_the_record_that_is_computed(self):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with track(model, k=2, every=2, background=True) as tracked:
            run_steps(model, optimizer, 3)
            tracked.record()
            state = tracked.state_dict()
        assert state["steps"] == [0, 2, 3]

    def test_tracked_models_can_be_copied_during_a_record(self):
        model = small_model()
        with track(model, k=2, every=1, background=True) as tracked:
            tracked.advance()
            tracked.record()
            copied = copy.deepcopy(model)
        assert torch.equal(copied[0].weight, model[0].weight)
