# SPDX-License-Identifier: MIT
"""Records and losses through the training loops of Lightning, Transformers and Accelerate."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from helpers.torch_networks import draw_rows, make_two_layers  # noqa: E402
from tolerances import tolerance  # noqa: E402
from torch import nn  # noqa: E402

import dlnfast as dln  # noqa: E402

STEPS = 6
ACCUMULATED = 3
N_ROWS = STEPS * ACCUMULATED * 4

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # warnings of the other packages about the machine and small loaders


def network():
    return make_two_layers(10, 14, 2, activation=nn.Tanh(), seed=3, dtype=torch.float64)


def largest_singular_values(weight, k):
    return torch.linalg.svdvals(weight.detach())[:k].numpy()


def assert_records(run, saved_weights, layer, k=2):
    """Assert that every record of a layer has the singular values of the weight saved at its step."""
    for record, step in enumerate(run.steps):
        error = run.singular_value_errors(layer)[record]
        gap = np.abs(
            run.singular_values(layer)[record] - largest_singular_values(saved_weights[int(step)], k)
        )
        assert np.all(gap <= error + tolerance(float, 14))


# ---------------------------------------------------------------------------------- Lightning


@pytest.fixture
def module(lightning):
    class Module(lightning.LightningModule):
        manual = False

        def __init__(self):
            super().__init__()
            self.net = network()
            self.losses = {}
            self.saved_weights = {0: self.net[2].weight.detach().clone()}
            self.automatic_optimization = not self.manual

        def training_step(self, batch, index):
            loss = (self.net(batch) - 1).square().mean()
            self.losses.setdefault(self.trainer.global_step, []).append(float(loss.detach()))
            if self.manual:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
            return loss

        def configure_optimizers(self):
            if self.manual:
                parts = (self.net[0], self.net[2])
                return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_batch_end(self, *arguments):
            steps = self.trainer.global_step // (2 if self.manual else 1)
            self.saved_weights[steps] = self.net[2].weight.detach().clone()

    return Module


def fit(lightning, model, callbacks, folder, accumulated=1, n=STEPS, **settings):
    trainer = lightning.Trainer(
        accumulate_grad_batches=accumulated,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )
    data = draw_rows(n * accumulated * 4, dtype=torch.float64)
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("limit", ["max_steps", "max_epochs"])
def test_lightning_losses_with_gradient_accumulation(lightning, module, tmp_path, every, limit):
    from dlnfast.integrations.lightning import SpectralCallback

    spectra = SpectralCallback("net.2", k=2, every=every)
    model = module()
    fit(
        lightning,
        model,
        [spectra],
        tmp_path,
        ACCUMULATED,
        **({"max_steps": STEPS} if limit == "max_steps" else {"max_epochs": 1}),
    )
    run = spectra.trajectory()
    assert run.steps.tolist() == sorted({*range(0, STEPS + 1, every), STEPS})
    assert_records(run, model.saved_weights, "net.2")
    assert run.loss_steps.tolist() == list(range(0, STEPS, every))
    for step, loss in zip(run.loss_steps, run.loss, strict=True):
        assert len(model.losses[int(step)]) == ACCUMULATED
        assert loss == pytest.approx(np.mean(model.losses[int(step)]), rel=1e-12)


def test_lightning_manual_optimization_with_two_optimizers(lightning, module, tmp_path):
    from dlnfast.integrations.lightning import SpectralCallback

    spectra = SpectralCallback("net.2", k=2, every=1)
    model = module()
    model.manual, model.automatic_optimization = True, False
    fit(lightning, model, [spectra], tmp_path, max_epochs=1)
    run = spectra.trajectory()
    assert run.steps.tolist() == list(range(STEPS + 1))
    assert_records(run, model.saved_weights, "net.2")
    wanted = [losses[0] for _, losses in sorted(model.losses.items())]
    np.testing.assert_allclose(run.loss, wanted, rtol=1e-12)


def test_lightning_averages_at_the_end_are_not_recorded(lightning, module, tmp_path):
    from dlnfast.integrations.lightning import SpectralCallback

    class Average(lightning.Callback):
        """Replaces the weights of the model at the end of training, as averaging callbacks do."""

        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.net[2].weight.mul_(0.5)

    spectra = SpectralCallback("net.2", k=2, every=4)
    model = module()
    fit(lightning, model, [Average(), spectra], tmp_path, max_epochs=1)
    run = spectra.trajectory()
    assert run.steps.tolist() == [0, 4, STEPS]
    assert_records(run, model.saved_weights, "net.2")


def test_lightning_losses_that_are_not_finite_are_left_out(lightning, module, tmp_path):
    from dlnfast.integrations.lightning import SpectralCallback

    class Broken(module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss if index != 2 else loss - loss + loss.new_tensor(float("nan")).detach()

    spectra = SpectralCallback("net.2", k=2, every=1)
    with pytest.warns(RuntimeWarning, match="the loss at step 2 is nan: losses that are not finite"):
        fit(lightning, Broken(), [spectra], tmp_path, max_epochs=1)
    assert spectra.trajectory().loss_steps.tolist() == [0, 1, 3, 4, 5]


# ------------------------------------------------------------------------------- Transformers


class Network(nn.Module):
    """The network that the Trainer trains; it saves its losses by the step of the Trainer."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, inputs):
        return {"loss": (self.net(inputs) - 1).square().mean()}


def run_trainer(transformers, callbacks, folder, steps, resume=None, model=None, accumulated=1, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulated,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"logging_steps": 1, "save_steps": 3, **settings},
    )
    data = [{"inputs": row} for row in draw_rows(N_ROWS, dtype=torch.float64)]
    trainer = transformers.Trainer(
        model or Network(), arguments, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_losses_belong_to_the_weights_before_the_step(transformers, tmp_path):
    from dlnfast.integrations.transformers import SpectralCallback

    class Watch(transformers.TrainerCallback):
        def __init__(self):
            self.saved_weights, self.losses = {}, {}

        def on_step_begin(self, args, state, control, model=None, **arguments):
            self.saved_weights[state.global_step] = model.net[2].weight.detach().clone()

        on_train_end = on_step_begin

        def on_log(self, args, state, control, logs=None, **arguments):
            if "loss" in logs:
                self.losses[state.global_step - 1] = logs["loss"]

    spectra, watch = SpectralCallback("net.2", k=2, every=2), Watch()
    run_trainer(transformers, [spectra, watch], tmp_path, STEPS - 1, accumulated=ACCUMULATED)
    run = spectra.trajectory()
    assert run.steps.tolist() == [0, 2, 4, 5]
    assert_records(run, watch.saved_weights, "net.2")
    assert run.loss_steps.tolist() == list(range(STEPS - 1))
    assert dict(zip(run.loss_steps.tolist(), run.loss.tolist(), strict=True)) == watch.losses


def test_the_best_model_is_not_the_last_record(transformers, tmp_path):
    from dlnfast.integrations.transformers import SpectralCallback

    class Worse(Network):
        """Its loss is least at the start."""

        def forward(self, inputs, return_loss=True):
            return {
                "loss": -super().forward(inputs)["loss"] if self.training else super().forward(inputs)["loss"]
            }

    class Watch(transformers.TrainerCallback):
        last = None

        def on_step_end(self, args, state, control, model=None, **arguments):
            self.last = model.net[2].weight.detach().clone()

    spectra, watch, model = SpectralCallback("net.2", k=2, every=4), Watch(), Worse()
    trainer = run_trainer(
        transformers,
        [spectra, watch],
        tmp_path,
        STEPS,
        model=model,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert not torch.equal(model.net[2].weight, watch.last)  # the best model was loaded
    run = spectra.trajectory()
    assert run.steps.tolist() == [0, 4, STEPS]
    np.testing.assert_allclose(
        run.singular_values("net.2")[-1], largest_singular_values(watch.last, 2), rtol=tolerance(float, 14)
    )


def test_records_are_found_after_the_output_folder_changed(transformers, tmp_path):
    from dlnfast.integrations.transformers import SpectralCallback

    def spectra(**settings):
        return SpectralCallback(k=2, every=1, **settings)

    run_trainer(transformers, [spectra()], tmp_path / "first", 3)
    whole = spectra()
    run_trainer(transformers, [whole], tmp_path / "whole", STEPS)

    elsewhere = spectra()
    run_trainer(
        transformers, [elsewhere], tmp_path / "second", STEPS, str(tmp_path / "first" / "checkpoint-3")
    )
    # Folders that were moved since are named.
    shutil.move(tmp_path / "first", tmp_path / "moved")
    moved = tmp_path / "moved" / "checkpoint-3"
    named = spectra(resume_from=moved)
    run_trainer(transformers, [named], tmp_path / "third", STEPS, str(moved))
    for resumed in (elsewhere, named):
        run, wanted = resumed.trajectory(), whole.trajectory()
        assert run.steps.tolist() == wanted.steps.tolist() == list(range(STEPS + 1))
        assert run.loss_steps.tolist() == wanted.loss_steps.tolist()
        for layer in (1, 2):
            np.testing.assert_allclose(
                run.singular_values(layer), wanted.singular_values(layer), rtol=tolerance(float, 14, STEPS)
            )

    lost = spectra()
    with pytest.warns(RuntimeWarning, match=r"resumed at step 3, but the records before it were not found"):
        run_trainer(transformers, [lost], tmp_path / "fourth", STEPS, str(moved))
    assert lost.trajectory().steps.tolist() == [3, 4, 5, 6]
    assert lost.trajectory().loss_steps.tolist() == [3, 4, 5]


def test_records_of_another_training_are_ignored(transformers, tmp_path):
    from dlnfast.integrations.transformers import SpectralCallback

    other = Network()
    with torch.no_grad():
        other.net[0].weight.mul_(3)
    run_trainer(transformers, [SpectralCallback(k=2, every=1)], tmp_path / "here", 3, model=other)
    run_trainer(transformers, [SpectralCallback(k=2, every=1)], tmp_path / "first", 3)
    shutil.move(tmp_path / "first", tmp_path / "moved")
    spectra = SpectralCallback(k=2, every=1)
    # The folder of this output has a checkpoint of the same step, which belongs to other weights.
    with pytest.warns(RuntimeWarning, match="has the norm"):
        run_trainer(
            transformers, [spectra], tmp_path / "here", STEPS, str(tmp_path / "moved" / "checkpoint-3")
        )
    assert spectra.trajectory().steps.tolist() == [3, 4, 5, 6]
    asked = SpectralCallback(k=2, every=1, resume_from=tmp_path / "nothing")
    with pytest.warns(RuntimeWarning, match="dlnfast_tracker.pt is not there"):
        run_trainer(transformers, [asked], tmp_path / "x", STEPS, str(tmp_path / "moved" / "checkpoint-3"))


# --------------------------------------------------------------------------------- Accelerate


@pytest.mark.parametrize("every", [1, 2])
def test_accelerate_with_gradient_accumulation(every):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is optional")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = network()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    saved_weights = {0: model[2].weight.detach().clone()}
    with dln.torch.track(model, "2", k=2, every=every) as tracked:
        for number, part in enumerate(draw_rows(N_ROWS, dtype=torch.float64).split(4), 1):
            with accelerator.accumulate(prepared):
                accelerator.backward((prepared(part) - 1).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if number % ACCUMULATED == 0:
                saved_weights[number // ACCUMULATED] = model[2].weight.detach().clone()
    run = tracked.trajectory()
    assert run.steps.tolist() == list(range(0, STEPS + 1, every))
    assert_records(run, saved_weights, "2")
