# SPDX-License-Identifier: MIT
"""`Trainer`: the steps of a manual loop, and the same steps after an interruption."""

from __future__ import annotations

import math
import os
import re
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from helpers.torch_networks import assert_same_state, copy_state  # noqa: E402
from tolerances import tolerance  # noqa: E402
from torch import nn  # noqa: E402

import dlnfast as dln  # noqa: E402
from dlnfast.torch import (  # noqa: E402
    MLP,
    Batches,
    CheckpointFile,
    LossOptions,
    OptimizerOptions,
    Samples,
    ScheduleOptions,
    Trainer,
    track,
)
from dlnfast.torch._cuda_graphs import capture_passes  # noqa: E402
from dlnfast.torch.trainer import _StateFile  # noqa: E402


def data(n=23, dim=6, n_classes=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(n_classes, (n,), generator=generator)
    return Samples(inputs.to(dtype), labels)


def network(seed=0, **settings):
    return MLP([6, 8, 7, 3], seed=seed, dtype=torch.float64, **settings)


def with_dropout(seed=0):
    """A model with batch normalisation and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 12), nn.Linear(12, 3)
    ).to(torch.float64)


def trainer(model, **settings):
    return Trainer(model, **{"learning_rate": 0.1, "epochs": 4, "batch_size": 5, **settings})


# -------------------------------------------------------------------------------- training steps


def by_hand(model, samples, value, make, epochs, size, rates, seed=0):
    """Return the losses and accuracies of the epochs of a manual loop."""
    optimizer = make(model.parameters())
    batches = Batches(*samples, size, shuffle=True, seed=seed)
    losses, accuracies = [], []
    for rate in rates[:epochs]:
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, right = 0.0, 0
        for x, y in batches:
            optimizer.zero_grad()
            outputs = model(x)
            loss = value(outputs, y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
            right += int((outputs.argmax(dim=1) == y).sum())
        losses.append(total / len(samples.labels))
        accuracies.append(right / len(samples.labels))
    return losses, accuracies


def squared(scale, outputs, labels):
    total = 0.0
    for row, label in zip(outputs, labels.tolist(), strict=True):
        target = torch.zeros_like(row)
        target[label] = 1.0
        total = total + ((scale * row - target) ** 2).sum()
    return total / len(labels)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"loss": LossOptions("squared", 2.5)}, partial(squared, 2.5)),
        ({"loss": "squared"}, partial(squared, 1.0)),
        ({}, nn.functional.cross_entropy),
        (
            {"loss": LossOptions(output_scale=0.5)},
            lambda outputs, y: nn.functional.cross_entropy(0.5 * outputs, y),
        ),
        (
            {"loss": LossOptions(lambda outputs, y: outputs.square().mean() + 0 * y.sum(), 3.0)},
            lambda outputs, y: 9 * outputs.square().mean(),
        ),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_losses_equal_those_of_a_manual_loop(settings, value, optimizer):
    samples = data()
    ours, theirs = network(), network()
    options = OptimizerOptions(optimizer, weight_decay=1e-2)
    seen = trainer(ours, optimizer=options, schedule="constant", **settings)
    history = seen.fit(*samples)
    make = {
        "sgd": partial(torch.optim.SGD, lr=1.0, momentum=0.9, weight_decay=1e-2),
        "adamw": partial(torch.optim.AdamW, lr=1.0, weight_decay=1e-2),
    }[optimizer]
    losses, accuracies = by_hand(theirs, samples, value, make, 4, 5, [0.1] * 4)
    # Steps through batch normalisation and Adam's division amplify roundings.
    slack = 100 * tolerance(float, 8, 20)
    np.testing.assert_allclose(history.loss, losses, rtol=slack)
    assert history.accuracy == accuracies
    assert seen.history is history
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=slack * float(other.detach().abs().max()))


def test_the_optimizer_can_be_a_callable():
    samples = data()
    ours, theirs = network(), network()

    def groups(parameters):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": others, "lr": 0.2}])

    history = trainer(
        ours, optimizer=groups, learning_rate=None, schedule=ScheduleOptions(final_rate=0.0)
    ).fit(*samples)
    assert history.learning_rate == [0.02 * 0.5 * (1 + math.cos(math.pi * e / 4)) for e in range(4)]
    optimizer = groups(theirs.parameters())
    batches = Batches(*samples, 5, shuffle=True)
    for epoch in range(4):
        for group, rate in zip(optimizer.param_groups, (0.02, 0.2), strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * epoch / 4))
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(theirs(x), y).backward()
            optimizer.step()
    assert_same_state(copy_state(ours), copy_state(theirs))


def test_cosine_learning_rates():
    model = network()
    seen = trainer(
        model, learning_rate=0.3, schedule=ScheduleOptions(final_rate=0.1), epochs=6, optimizer="adamw"
    )
    met = []
    history = seen.fit(
        *data(), after_epoch=lambda epoch: met.append((epoch, seen.optimizer.param_groups[0]["lr"]))
    )
    wanted = [0.3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * e / 6))) for e in range(6)]
    assert history.learning_rate == wanted
    assert met == list(enumerate(wanted, start=1))
    assert seen.rate(0) == 1.0
    assert seen.rate(3) == pytest.approx(0.55, rel=1e-15)
    assert seen.rate(6) == pytest.approx(0.1, rel=1e-15)
    constant = trainer(model, learning_rate=0.3, schedule="constant")
    assert [constant.rate(e) for e in range(5)] == [1.0] * 5


def test_a_single_last_sample_is_added_to_the_batch_before():
    sizes = []
    model = network()
    model.layers[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    history = trainer(model, epochs=1).fit(*data(n=21))
    assert sizes == [5, 5, 5, 6]
    assert math.isfinite(history.loss[0])
    assert model.layers[0].norm.num_batches_tracked == 4
    # With a batch size of 1 no sample is added to another batch.
    plain = network(batch_norm=False)
    with track(plain, k=1) as tracked:
        trainer(plain, epochs=1, batch_size=1).fit(*data(n=3))
    assert tracked.step == 3


# -------------------------------------------------------------------------------------- random numbers


def test_training_depends_on_the_seed_only():
    ends = []
    for seed in (1, 1, 2):
        model = with_dropout()
        trainer(model, seed=seed).fit(*data())
        ends.append(copy_state(model))
    assert_same_state(ends[0], ends[1])
    assert not torch.equal(ends[0]["0.weight"], ends[2]["0.weight"])


def test_dropout_masks_differ_between_epochs():
    model = with_dropout()
    masks = []
    model[3].register_forward_hook(lambda module, inputs, output: masks.append((output == 0).clone()))
    trainer(model, epochs=3, batch_size=23, learning_rate=0.0).fit(*data())
    assert len(masks) == 3
    n_active = [mask.sum(dim=0) for mask in masks]  # whatever the order of the samples
    assert not torch.equal(n_active[0], n_active[1])
    assert not torch.equal(n_active[1], n_active[2])


def test_global_generators_are_not_changed():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    seen = trainer(with_dropout(1))
    torch.set_rng_state(before[0])
    seen.fit(*data(), test=data(seed=1), test_every=1, after_epoch=lambda _: torch.rand(3) is None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    ends = []
    for draws in (0, 7):  # nor do global generators matter
        model = with_dropout(1)
        torch.rand(draws)
        trainer(model).fit(*data(), after_epoch=lambda _, draws=draws: torch.rand(draws) is None)
        ends.append(copy_state(model))
    assert_same_state(*ends)


# ---------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_training_takes_the_same_steps(tmp_path, optimizer, stop):
    samples, test = data(), data(seed=1)
    options = OptimizerOptions(optimizer, weight_decay=1e-2)
    settings = {"optimizer": options, "epochs": 6, "learning_rate": 0.01}
    whole = with_dropout()
    with track(whole, k=2, every=4) as one:
        wanted = trainer(whole, tracker=one, **settings).fit(*samples, test=test, test_every=2)
    file_path = tmp_path / "checkpoint.pt"
    first = with_dropout()
    seen = track(first, k=2, every=4)
    trainer(first, tracker=seen, checkpoint=file_path, **settings).fit(
        *samples, test=test, test_every=2, after_epoch=lambda epoch: epoch == stop
    )
    seen.close()
    other = with_dropout(seed=8)
    torch.rand(3)
    with track(other, k=2, every=4) as two:
        resumed = trainer(other, tracker=two, checkpoint=file_path, **settings)
        history = resumed.fit(*samples, test=test, test_every=2)
    assert_same_state(copy_state(whole), copy_state(other))
    assert whole[1].num_batches_tracked == 6 * 5
    for name in ("loss", "accuracy", "learning_rate"):
        assert getattr(history, name) == getattr(wanted, name), name
    # The test accuracy is also measured when a training is stopped.
    indices = [i for i, epoch in enumerate(history.test_epochs) if epoch in wanted.test_epochs]
    assert [history.test_accuracy[i] for i in indices] == wanted.test_accuracy
    for of in ("weights", "change"):
        left, right = one.trajectory(of), two.trajectory(of)
        assert left.steps.tolist() == right.steps.tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 30]
        assert left.loss.tolist() == right.loss.tolist()
        for name in left.layer_names:
            slack = left.singular_value_errors(name) + right.singular_value_errors(name)
            assert np.all(np.abs(left.singular_values(name) - right.singular_values(name)) <= slack)
    assert resumed.fit(*samples) is resumed.history  # nothing is left
    assert len(resumed.history.loss) == 6


def test_a_stopped_training_continues_without_a_checkpoint():
    whole, halves = with_dropout(), with_dropout()
    wanted = trainer(whole).fit(*data())
    seen = trainer(halves)
    seen.fit(*data(), after_epoch=lambda epoch: epoch == 1)
    assert len(seen.history.loss) == 1
    seen.fit(*data())
    assert seen.history.loss == wanted.loss
    assert_same_state(copy_state(whole), copy_state(halves))


def test_epochs_can_be_added_with_a_constant_rate(tmp_path):
    file_path = tmp_path / "checkpoint.pt"
    longer, whole = with_dropout(), with_dropout()
    trainer(with_dropout(), schedule="constant", epochs=2, checkpoint=file_path).fit(*data())
    trainer(longer, schedule="constant", epochs=5, checkpoint=file_path).fit(*data())
    trainer(whole, schedule="constant", epochs=5).fit(*data())
    assert_same_state(copy_state(whole), copy_state(longer))


def test_checkpoints_are_written_at_the_requested_epochs(tmp_path, monkeypatch):
    file_path = tmp_path / "new" / "folder" / "checkpoint.pt"
    written = []
    monkeypatch.setattr(_StateFile, "write_state", lambda self, state: written.append(state.step))
    trainer(network(), epochs=7, checkpoint=CheckpointFile(file_path, every=3)).fit(*data())
    assert written == [3, 6, 7]
    trainer(network(), epochs=7, checkpoint=CheckpointFile(file_path, every=3)).fit(
        *data(), after_epoch=lambda epoch: epoch == 4
    )
    assert written == [3, 6, 7, 3, 4]
    monkeypatch.undo()
    trainer(network(), epochs=1, checkpoint=file_path).fit(*data())
    assert os.listdir(file_path.parent) == ["checkpoint.pt"]


def test_checkpoints_are_written_atomically(tmp_path, monkeypatch):
    file_path = tmp_path / "checkpoint.pt"
    seen = trainer(network(), checkpoint=file_path)
    seen.fit(*data(), after_epoch=lambda epoch: epoch == 1)
    before = file_path.read_bytes()
    save = torch.save

    def interrupted(obj, file):
        save(obj, file)
        file.truncate(100)
        assert file_path.read_bytes() == before  # nothing is written in place
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        seen.fit(*data())
    assert file_path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 5}, "epochs 4; this one has 5"),
        ({"batch_size": 6}, "batch_size 5; this one has 6"),
        ({"learning_rate": 0.2}, "learning_rate 0.1; this one has 0.2"),
        ({"optimizer": OptimizerOptions(momentum=0.5)}, "momentum 0.9; this one has 0.5"),
        ({"optimizer": OptimizerOptions(weight_decay=0.5)}, "weight_decay 0.0; this one has 0.5"),
        ({"schedule": "constant"}, "schedule cosine; this one has constant"),
        ({"schedule": ScheduleOptions(final_rate=0.5)}, "final_rate 0.01; this one has 0.5"),
        ({"seed": 1}, "seed 0; this one has 1"),
        ({"loss": "squared"}, "loss cross_entropy; this one has squared"),
        ({"loss": squared}, "loss cross_entropy; this one has squared"),
        ({"loss": LossOptions(output_scale=2.0)}, "output_scale 1.0; this one has 2.0"),
        ({"optimizer": "adamw"}, "optimizer SGD; this one has AdamW"),
        (
            {"model": MLP([6, 9, 7, 3], dtype=torch.float64)},
            "parameters ['layers.0.linear.weight', [8, 6]]; this one has ['layers.0.linear.weight', [9, 6]]",
        ),
        (
            {"model": with_dropout()},
            "parameters ['layers.0.linear.weight', [8, 6]]; this one has ['0.weight'",
        ),
    ],
)
def test_checkpoints_of_other_trainings_are_refused(tmp_path, changed, message):
    file_path = tmp_path / "checkpoint.pt"
    trainer(network(), checkpoint=file_path).fit(*data(), after_epoch=lambda epoch: True)
    model = changed.pop("model", network())
    before = copy_state(model)
    other = trainer(model, checkpoint=file_path, **changed)
    with pytest.raises(ValueError, match=re.escape(f"checkpoint.pt belongs to a training with {message}")):
        other.fit(*data())
    assert_same_state(before, copy_state(model))
    assert other.history.loss == []


def test_checkpoints_of_other_samples_and_trackers_are_refused(tmp_path):
    file_path = tmp_path / "checkpoint.pt"
    trainer(network(), checkpoint=file_path).fit(*data(), after_epoch=lambda epoch: True)
    with pytest.raises(ValueError, match=r"samples \(23, 6\) .*; this one has \(22, 6\)"):
        trainer(network(), checkpoint=file_path).fit(*data(n=22))
    model = network()
    tracked = track(model, k=1)
    with pytest.raises(ValueError, match="tracker none; this one has present"):
        trainer(model, checkpoint=file_path, tracker=tracked).fit(*data())
    file_path.unlink()
    trainer(model, checkpoint=file_path, tracker=tracked).fit(*data(), after_epoch=lambda epoch: True)
    with pytest.raises(ValueError, match="tracker present; this one has none"):
        trainer(network(), checkpoint=file_path).fit(*data())
    with pytest.raises(ValueError, match="state was taken with k 1; this tracker has 2"):
        trainer(model, checkpoint=file_path, tracker=track(model, k=2)).fit(*data())


def test_other_files_are_refused_as_checkpoints(tmp_path):
    file_path = tmp_path / "checkpoint.pt"
    file_path.write_bytes(b"not a checkpoint")
    seen = trainer(network(), checkpoint=file_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read as a checkpoint of a Trainer"):
        seen.fit(*data())
    for content in ({"model": network().state_dict()}, torch.ones(3), {"description": None}):
        torch.save(content, file_path)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint of a Trainer"):
            seen.fit(*data())
    trainer(network(), checkpoint=file_path.with_name("other.pt"), epochs=1).fit(*data())
    whole = file_path.with_name("other.pt").read_bytes()
    file_path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of a Trainer"):
        seen.fit(*data())


# ------------------------------------------------------------------------------------- end of training


@pytest.mark.parametrize("tracked", [False, True])
def test_divergence_is_an_error(tmp_path, tracked):
    model = MLP([6, 8, 8, 3], batch_norm=False, dtype=torch.float64)
    tracker = track(model, k=2, every=1) if tracked else None
    file_path = tmp_path / "checkpoint.pt"
    seen = trainer(
        model,
        loss="squared",
        optimizer=OptimizerOptions(momentum=0.0),
        learning_rate=1e9,
        tracker=tracker,
        checkpoint=file_path,
        epochs=50,
    )
    with pytest.raises(dln.DivergedError, match=r"lower the learning rate \(eta\), now 1e\+09") as caught:
        seen.fit(*data())
    assert caught.value.step % 5 == 0
    assert caught.value.step == 5 * (len(seen.history.loss) + 1)
    assert all(math.isfinite(loss) for loss in seen.history.loss)


def test_errors_of_optimizers_are_not_changed():
    class Refusing(torch.optim.SGD):
        def step(self, closure=None):
            raise ValueError("no step")

    with pytest.raises(ValueError, match="no step"):
        trainer(network(), optimizer=partial(Refusing, lr=0.1), learning_rate=None).fit(*data())


def test_after_epoch_can_stop_the_training():
    met = []

    def after(epoch):
        met.append(epoch)
        return epoch == 2

    seen = trainer(network())
    history = seen.fit(*data(), test=data(seed=1), after_epoch=after)
    assert met == [1, 2]
    assert len(history.loss) == len(history.accuracy) == 2
    assert history.test_epochs == [2]
    # Only True stops the training, not other true values.
    assert len(trainer(network()).fit(*data(), after_epoch=lambda epoch: 1).loss) == 4


def test_the_test_accuracy_is_measured_at_the_requested_epochs():
    samples, test = data(), data(seed=1)
    assert trainer(network(), epochs=5).fit(*samples, test=test).test_epochs == [5]
    seen = trainer(network(), epochs=5)
    accuracies = []
    history = seen.fit(
        *samples,
        test=test,
        test_every=2,
        after_epoch=lambda _: accuracies.append(seen.evaluate(*test).accuracy),
    )
    assert history.test_epochs == [2, 4, 5]
    assert history.test_accuracy == [accuracies[epoch - 1] for epoch in (2, 4, 5)]
    assert trainer(network(), epochs=0).fit(*samples, test=test).loss == []


def test_the_tracker_gets_the_loss_of_its_records():
    model = network()
    losses = []

    def value(outputs, labels):
        losses.append(nn.functional.cross_entropy(outputs, labels))
        return losses[-1]

    with track(model, k=1, every=3) as tracked:
        trainer(model, loss=value, tracker=tracked).fit(*data())
    run = tracked.trajectory()
    assert run.steps.tolist() == [0, 3, 6, 9, 12, 15, 18, 20]
    assert run.loss_steps.tolist() == run.steps.tolist()[:-1]
    assert run.loss.tolist() == [losses[step].item() for step in run.loss_steps]


# ------------------------------------------------------------------------------------------ evaluation


def test_evaluation_restores_the_modes():
    model = with_dropout()
    model.train()
    model[1].eval()
    before, buffers = [m.training for m in model.modules()], copy_state(model)
    samples = data()
    seen = trainer(model, loss=LossOptions("squared", 2.0))
    found = seen.evaluate(*samples, batch_size=4)
    assert [m.training for m in model.modules()] == before
    assert_same_state(copy_state(model), buffers)
    model.eval()
    with torch.no_grad():
        outputs = model(samples.inputs)
    assert found.loss == pytest.approx(float(squared(2.0, outputs, samples.labels)), rel=1e-12)
    assert found.accuracy == float((outputs.argmax(dim=1) == samples.labels).double().mean())
    model.train()
    with pytest.raises(RuntimeError):
        seen.evaluate(torch.ones(3, 99, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
    assert all(m.training for m in model.modules())


def test_labels_can_be_of_any_integer_type():
    samples = data()
    wanted = trainer(network()).fit(*samples).loss
    for dtype in (torch.int32, torch.uint8):
        assert trainer(network()).fit(samples.inputs, samples.labels.to(dtype)).loss == wanted


# --------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"loss": "hinge"},
            ValueError,
            "loss is 'hinge'; wanted one of 'cross_entropy', 'squared', or a callable",
        ),
        (
            {"optimizer": "lion"},
            ValueError,
            "optimizer is 'lion'; wanted one of 'sgd', 'adamw', or a callable",
        ),
        ({"schedule": "step"}, ValueError, "schedule is 'step'; wanted one of 'cosine', 'constant'$"),
        ({"schedule": math.cos}, ValueError, "schedule is .*wanted one of 'cosine', 'constant'$"),
        ({"learning_rate": None}, TypeError, r"learning_rate \(eta\) is missing; 'sgd' needs one"),
        ({"learning_rate": -1.0}, ValueError, r"learning_rate \(eta\) is -1"),
        ({"learning_rate": "fast"}, TypeError, r"learning_rate \(eta\) is 'fast'"),
        (
            {"optimizer": partial(torch.optim.SGD, lr=0.1)},
            ValueError,
            r"learning_rate \(eta\) is 0.1, but optimizer is a callable",
        ),
        (
            {"optimizer": list, "learning_rate": None},
            TypeError,
            r"optimizer returned list; wanted a torch\.optim\.Optimizer",
        ),
        (lambda: OptimizerOptions(momentum=-0.1), ValueError, r"is -0.1; wanted a number in \[0, 1\)"),
        (lambda: OptimizerOptions(weight_decay=math.nan), ValueError, "weight_decay is nan"),
        (lambda: LossOptions(output_scale=0.0), ValueError, r"output_scale \(a\) is 0"),
        (lambda: ScheduleOptions(final_rate=-1.0), ValueError, "final_rate is -1"),
        ({"epochs": -1}, ValueError, "epochs is -1"),
        ({"epochs": 1.5}, TypeError, "epochs is 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"seed": -1}, ValueError, "seed is -1"),
        (lambda: CheckpointFile("file", every=0), ValueError, "checkpoint.every is 0"),
        (lambda: CheckpointFile(3), TypeError, "checkpoint is 3; wanted a path"),
        ({"model": nn.ReLU()}, ValueError, r"model \(ReLU\) has no parameters"),
        ({"model": [1]}, TypeError, r"model is list; wanted a torch\.nn\.Module"),
    ],
)
def test_errors_name_the_invalid_setting(settings, error, message):
    if callable(settings):
        with pytest.raises(error, match=message):
            settings()
        return
    settings = dict(settings)
    with pytest.raises(error, match=message):
        trainer(settings.pop("model", network()), **settings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 6), torch.zeros(4, dtype=torch.int64)), dln.ShapeError, r"labels has shape \(4,\)"),
        ((torch.ones(3, 6), torch.zeros(3)), TypeError, r"labels has dtype torch.float32; wanted integers"),
        ((np.ones((3, 6)), torch.zeros(3)), TypeError, "inputs is ndarray; wanted a tensor"),
        ((torch.ones(3, 6), np.zeros(3)), TypeError, "labels is ndarray; wanted a tensor"),
        ((torch.ones(0, 6), torch.zeros(0, dtype=torch.int64)), ValueError, "inputs has 0 samples"),
        ((torch.ones(3, 6).double(), torch.tensor([0, 1, 3])), ValueError, r"labels are 0..3; wanted 0..2"),
        ((torch.ones(3, 6).double(), torch.tensor([-1, 1, 2])), ValueError, r"labels are -1..2; wanted 0..2"),
    ],
)
def test_errors_name_invalid_samples(arguments, error, message):
    for use in ("fit", "evaluate"):
        for loss in ("squared", "cross_entropy"):
            with pytest.raises(error, match=message):
                getattr(trainer(network(), loss=loss), use)(*arguments)
    with pytest.raises(ValueError, match="test_every is -1"):
        trainer(network()).fit(*data(), test_every=-1)


def test_progress_is_shown_on_terminals_only(capsys):
    trainer(network(), progress=True).fit(*data())
    assert capsys.readouterr() == ("", "")


def test_checkpoints_of_other_samples_or_with_more_epochs_are_refused(tmp_path):
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3

    def trainer(**settings):
        values = {"learning_rate": 0.1, "epochs": 3, "schedule": "constant", **settings}
        return Trainer(MLP([6, 8, 3], seed=0), checkpoint=tmp_path / "checkpoint.pt", **values)

    trainer().fit(inputs, labels)
    with pytest.raises(ValueError, match="belongs to a training with samples"):
        trainer().fit(inputs + 1, labels)
    with pytest.raises(ValueError, match="belongs to a training with samples"):
        trainer().fit(inputs, labels.flip(0))
    with pytest.raises(ValueError, match="has taken 3 epochs; epochs is 2"):
        trainer(epochs=2).fit(inputs, labels)
    assert len(trainer(epochs=4).fit(inputs, labels).loss) == 4


def test_the_checkpoint_exists_when_after_epoch_is_called(tmp_path):
    inputs, labels = torch.eye(6), torch.arange(6) % 3
    file_path, seen = tmp_path / "checkpoint.pt", []
    trainer = Trainer(MLP([6, 8, 3], seed=0), learning_rate=0.1, epochs=2, checkpoint=file_path)
    trainer.fit(inputs, labels, after_epoch=lambda done: seen.append((done, file_path.is_file())))
    assert seen == [(1, True), (2, True)]


def test_invalid_arguments_are_refused():
    inputs, labels = torch.eye(6), torch.arange(6) % 3
    model = MLP([6, 8, 3], seed=0)
    closed = dln.torch.track(model)
    closed.close()
    for settings, error, text in (
        ({"tracker": dln.torch.track(MLP([6, 8, 3]))}, ValueError, "follows none of this model's weights"),
        ({"tracker": closed}, ValueError, "was closed"),
        ({"tracker": 3}, TypeError, "tracker is int"),
        ({"device": "gpu"}, ValueError, "device is 'gpu'"),
    ):
        with pytest.raises(error, match=text):
            Trainer(model, learning_rate=0.1, epochs=1, **settings)
    trainer = Trainer(model, learning_rate=0.1, epochs=1)
    for settings, error, text in (
        ({"test": inputs}, TypeError, "test is Tensor; wanted a pair"),
        ({"test_every": 1}, ValueError, "there is no test"),
        ({"after_epoch": 3}, TypeError, "after_epoch is int"),
    ):
        with pytest.raises(error, match=text):
            trainer.fit(inputs, labels, **settings)


@pytest.mark.parametrize(
    ("keyword", "value", "replacement"),
    [
        ("output_scale", 2.0, "loss=LossOptions(output_scale=...)"),
        ("momentum", 0.5, "optimizer=OptimizerOptions(momentum=...)"),
        ("weight_decay", 0.5, "optimizer=OptimizerOptions(weight_decay=...)"),
        ("final_rate", 0.5, "schedule=ScheduleOptions(final_rate=...)"),
        ("checkpoint_every", 2, "checkpoint=CheckpointFile(path, every=...)"),
    ],
)
def test_keywords_of_earlier_versions_raise_an_error_that_names_the_new_option(keyword, value, replacement):
    with pytest.raises(
        TypeError, match=re.escape(f"no keyword '{keyword}' since version 0.2.0: write {replacement}")
    ):
        trainer(network(), **{keyword: value})


def test_a_name_is_equivalent_to_the_options_with_their_defaults():
    histories = [
        trainer(network(), loss=loss, optimizer=optimizer, schedule=schedule).fit(*data())
        for loss, optimizer, schedule in (
            ("squared", "adamw", "constant"),
            (LossOptions("squared"), OptimizerOptions("adamw"), ScheduleOptions("constant")),
        )
    ]
    assert histories[0] == histories[1]


class TestInterruption:
    """Files and notes after an exception."""

    def test_an_exception_between_two_epochs_writes_the_state(self, tmp_path):
        path = tmp_path / "checkpoint.pt"
        whole, first, second = with_dropout(), with_dropout(), with_dropout()
        wanted = trainer(whole).fit(*data())

        def interrupt(epoch):
            if epoch == 2:
                raise KeyboardInterrupt

        rare = CheckpointFile(path, every=10)
        with pytest.raises(KeyboardInterrupt) as caught:
            trainer(first, checkpoint=rare).fit(*data(), after_epoch=interrupt)
        assert caught.value.__notes__ == [
            f"everything up to epoch 2 is saved in {path}: `fit` with the same checkpoint resumes from there"
        ]
        assert trainer(second, checkpoint=rare).fit(*data()).loss == wanted.loss
        assert_same_state(copy_state(whole), copy_state(second))

    def test_an_exception_within_an_epoch_preserves_the_last_state(self, tmp_path):
        path = tmp_path / "checkpoint.pt"
        calls = []

        def interrupted(outputs, labels):
            calls.append(1)
            if len(calls) == 12:  # in the third epoch
                raise KeyboardInterrupt
            return nn.functional.cross_entropy(outputs, labels)

        with pytest.raises(KeyboardInterrupt) as caught:
            trainer(with_dropout(), loss=interrupted, checkpoint=path).fit(*data())
        assert caught.value.__notes__[-1].startswith(f"everything up to epoch 2 is saved in {path}")
        assert len(torch.load(path, weights_only=True)["history"]["loss"]) == 2

    def test_the_note_reports_a_full_disk(self, tmp_path, monkeypatch):
        def full(self, saved):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(_StateFile, "write_state", full)
        with pytest.raises(OSError, match="No space") as caught:
            trainer(network(), checkpoint=tmp_path / "checkpoint.pt").fit(*data())
        assert "is lost (OSError" in caught.value.__notes__[-1]


# -------------------------------------------------------------------------------- CUDA graphs


def test_only_training_batches_of_the_captured_shape_are_replayed(monkeypatch):
    """With a stand-in for the capture, which runs the model as the real one does."""
    model = MLP([6, 8, 3], seed=0)
    before = copy_state(model)
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    replayed = []

    def capture(module, arguments):
        assert module.training
        eager = module.forward
        eager(arguments[0])  # changes the statistics of batch normalisation

        def forward(x):
            if module.training:
                replayed.append(len(x))
            return eager(x)

        module.forward = forward

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    capture_passes(model, inputs)
    assert "forward" not in vars(model)  # there is nothing to capture on the CPU

    class OnDevice(torch.Tensor):
        device = torch.device("cuda")

    model.eval()
    capture_passes(model, inputs.as_subclass(OnDevice))
    assert not model.training
    assert_same_state(copy_state(model), before)
    plain = MLP([6, 8, 3], seed=0)
    settings = {"epochs": 2, "batch_size": 5}
    samples = Samples(torch.cat([inputs, inputs[:3]]), torch.arange(8) % 3)
    histories = [trainer(each, **settings).fit(*samples, test=samples) for each in (model, plain)]
    assert histories[0] == histories[1]
    assert_same_state(copy_state(model), copy_state(plain))
    assert replayed == [5, 5]  # neither the smaller last batches nor the test
