# SPDX-License-Identifier: MIT
"""Callbacks for Lightning and transformers take the same records as a manual loop."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from helpers.torch_networks import draw_rows, make_two_layers  # noqa: E402
from torch import nn  # noqa: E402

import dlnfast as dln  # noqa: E402

STEPS = 7
EVERY = 2


def network():
    return make_two_layers(10, 30, 2, seed=3)


def plain_loop():
    """Return the records of the same training in a manual loop."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with dln.torch.track(model, k=3, every=EVERY) as tracked:
        for batch in draw_rows(STEPS * 4).split(4):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    return tracked


def assert_same(seen, tracked, prefix):
    for of in ("weights", "change"):
        run, wanted = seen.trajectory(of), tracked.trajectory(of)
        assert run.steps.tolist() == wanted.steps.tolist()
        assert run.layer_names == [prefix + name for name in wanted.layer_names]
        for layer in range(1, run.n_layers + 1):
            np.testing.assert_array_equal(run.singular_values(layer), wanted.singular_values(layer))


class TestLightning:
    def module(self, lightning):
        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = network()

            def training_step(self, batch, index):
                return self.net(batch).square().mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        return Module()

    def fit(self, lightning, spectra, tmp_path, steps, checkpoint=None):
        trainer = lightning.Trainer(
            max_steps=steps,
            callbacks=[spectra],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        loader = torch.utils.data.DataLoader(draw_rows(STEPS * 4), batch_size=4)
        trainer.fit(self.module(lightning), loader, ckpt_path=checkpoint)
        return trainer

    @pytest.mark.filterwarnings("ignore")  # of Lightning's, about this machine and small loaders
    def test_records_equal_those_of_a_manual_loop(self, lightning, tmp_path):
        from dlnfast.integrations.lightning import SpectralCallback

        spectra = SpectralCallback(k=3, every=EVERY)
        with pytest.raises(RuntimeError, match="there are no records"):
            spectra.trajectory()
        self.fit(lightning, spectra, tmp_path, STEPS)
        assert_same(spectra, plain_loop(), "net.")
        run = spectra.trajectory()
        assert run.loss_steps.tolist() == [0, 2, 4, 6]
        first = network()(draw_rows(STEPS * 4)[:4]).square().mean()
        assert run.loss[0] == pytest.approx(float(first), rel=1e-6)

    @pytest.mark.filterwarnings("ignore")
    def test_a_checkpoint_contains_the_records(self, lightning, tmp_path):
        from dlnfast.integrations.lightning import SpectralCallback

        trainer = self.fit(lightning, SpectralCallback(k=3, every=EVERY), tmp_path, 4)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        spectra = SpectralCallback(k=3, every=EVERY)
        self.fit(lightning, spectra, tmp_path, STEPS, checkpoint=str(tmp_path / "half.ckpt"))
        run = spectra.trajectory()
        assert run.steps.tolist() == [0, 2, 4, 6, 7]
        change = spectra.trajectory("change")
        assert not change.singular_values(1)[0].any()  # measured from the start of the first fit
        assert change.singular_values(1)[1].any()


class TestTransformers:
    def train(self, transformers, spectra, folder, steps, resume=None):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = network()

            def forward(self, inputs):
                return {"loss": self.net(inputs).square().mean()}

        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
            save_steps=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
        )
        data = [{"inputs": row} for row in draw_rows(STEPS * 4)]
        trainer = transformers.Trainer(Model(), arguments, train_dataset=data, callbacks=[spectra])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    @pytest.mark.filterwarnings("ignore")
    def test_records_and_checkpoints_of_a_training(self, transformers, tmp_path):
        from dlnfast.integrations.transformers import SpectralCallback

        whole, half, again = (SpectralCallback(k=3, every=EVERY) for _ in range(3))
        with pytest.raises(RuntimeError, match="there are no records"):
            whole.trajectory()
        trainer = self.train(transformers, whole, tmp_path / "whole", STEPS)
        run = whole.trajectory()
        assert run.layer_names == ["net.0", "net.2"]
        assert run.steps.tolist() == [0, 2, 4, 6, 7]
        assert run.loss_steps.tolist() == list(range(STEPS))  # of the weights before each step
        exact = torch.linalg.svdvals(trainer.model.net[0].weight.detach()).numpy()[:3]
        np.testing.assert_allclose(run.singular_values("net.0")[-1], exact, rtol=1e-5)

        self.train(transformers, half, tmp_path / "parts", 4)
        assert (tmp_path / "parts" / "checkpoint-4" / "dlnfast_tracker.pt").is_file()
        self.train(transformers, again, tmp_path / "parts", STEPS, str(tmp_path / "parts" / "checkpoint-4"))
        for of in ("weights", "change"):
            resumed, wanted = again.trajectory(of), whole.trajectory(of)
            assert resumed.steps.tolist() == wanted.steps.tolist()
            for layer in (1, 2):
                np.testing.assert_allclose(
                    resumed.singular_values(layer), wanted.singular_values(layer), rtol=1e-4, atol=1e-6
                )

    def test_attention_weights_of_a_bert_are_tracked(self, transformers):
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
        )
        model = transformers.BertModel(config)
        found = dln.torch.weight_matrices(model, "encoder.layer.*.attention.self.*")
        assert [m.name.rsplit(".", 1)[1] for m in found] == 2 * ["query", "key", "value"]
        gpt = transformers.GPT2Model(
            transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=8)
        )
        assert dln.torch.weight_matrices(gpt, "h.0.mlp.c_fc")[0].shape == (128, 32)


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_without_the_package_the_error_names_it(run_python, package):
    program = f"""
import sys
sys.modules["{package}"] = None
try:
    import dlnfast.integrations.{package}
except ModuleNotFoundError as error:
    print(error)
"""
    assert f"pip install {package}" in run_python(program)
