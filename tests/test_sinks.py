# SPDX-License-Identifier: MIT
"""Sinks and alarms of `track` and of the callbacks, with the packages that are installed."""

from __future__ import annotations

import contextlib
import csv
import json
import pickle
import sqlite3
import sys
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from helpers.torch_networks import draw_rows, make_two_layers  # noqa: E402

import dlnfast as dln  # noqa: E402
from dlnfast.integrations import sinks  # noqa: E402
from dlnfast.torch import Alarm, LayerRecord, Report, StopTraining  # noqa: E402

QUANTITIES = ["largest_singular_value", "stable_rank", "effective_rank", "energy_share"]
METRICS = {"weights/0/stable_rank": 1.5, "change/head.out/energy_share": 0.25}


class Memory:
    """A sink that keeps what it receives."""

    def __init__(self):
        self.found = []

    def log(self, metrics, step):
        self.found.append((step, dict(metrics)))

    @property
    def steps(self):
        return [step for step, _ in self.found]


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def descend(model, *, steps, calls=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in draw_rows(steps * 4).split(4):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if calls is not None:
            calls.append(batch)


def train(report, *, steps=6, every=2, calls=None, **options):
    """Train with a tracker; return it."""
    model = make_two_layers(10, 30, 2, seed=3)
    with dln.torch.track(model, k=options.pop("k", 3), every=every, report=report, **options) as tracked:
        descend(model, steps=steps, calls=calls)
    return tracked


# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("background", [False, True])
def test_sinks_receive_the_metrics_of_every_record(background):
    sink = Memory()
    tracked = train(Report(sinks=[sink]), steps=5, k="all", background=background)
    assert sink.steps == tracked.trajectory().steps.tolist() == [0, 2, 4, 5]
    for of in ("weights", "change"):
        run = tracked.trajectory(of)
        for layer in run.layer_names:
            values = run.singular_values(layer).astype(np.float64)
            for row, (_, metrics) in enumerate(sink.found):
                wanted = {
                    "largest_singular_value": values[row, 0],
                    "stable_rank": dln.measures.stable_rank(values[row]),
                    "effective_rank": dln.measures.effective_rank(values[row]),
                    "energy_share": dln.measures.energy_share(values[row], values.shape[1]),
                }
                assert {f"{of}/{layer}/{name}" for name in wanted} <= set(metrics)
                for name, value in wanted.items():
                    assert metrics[f"{of}/{layer}/{name}"] == pytest.approx(value, rel=1e-5)
    assert len(sink.found[0][1]) == 2 * 2 * len(QUANTITIES)


def test_metrics_of_few_values_use_the_norm():
    sink, everything = Memory(), Memory()
    train(Report(sinks=[sink]), k=1)
    train(Report(sinks=[everything]), k="all")
    for (_, few), (_, whole) in zip(sink.found, everything.found, strict=True):
        assert few["weights/0/stable_rank"] == pytest.approx(whole["weights/0/stable_rank"], rel=1e-3)
        assert few["weights/0/energy_share"] == pytest.approx(1 / few["weights/0/stable_rank"], rel=1e-6)


def test_a_failing_sink_does_not_stop_the_training():
    class Broken:
        def log(self, metrics, step):
            raise OSError("disk full")

    sink = Memory()
    with pytest.warns(RuntimeWarning, match="sink Broken did not store step 0: OSError: disk full") as found:
        train(Report(sinks=[Broken(), sink]))
    assert len(found) == 1
    assert sink.steps == [0, 2, 4, 6]


# ------------------------------------------------------------------------------------------------- alarms


def test_an_alarm_warns_once_while_it_is_on():
    alarm = Alarm("stable_rank > 0", layers="0", of="change")
    with pytest.warns(
        RuntimeWarning, match=r"the change of layer 0 at step 2: stable_rank > 0 \(stable"
    ) as w:
        train(Report(alarms=[alarm]))
    assert len(w) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Report(alarms=[Alarm("stable_rank > 1e9"), Alarm("stable_rank < 0", layers=["*"])]))


def test_an_alarm_warns_again_after_it_was_off():
    with pytest.warns(RuntimeWarning) as found:
        train(Report(alarms=[Alarm(lambda record: record.step % 4 == 2, layers="0")]), steps=8)
    assert [str(each.message).split(":")[0] for each in found] == ["layer 0 at step 2", "layer 0 at step 6"]


@pytest.mark.parametrize("background", [False, True])
def test_an_alarm_stops_before_the_next_step(background):
    calls = []
    alarm = Alarm("largest_singular_value > 0", action="stop")
    with pytest.raises(StopTraining, match="layer 0 at step 2: largest_singular_value > 0") as found:
        train(Report(alarms=[alarm]), calls=calls, background=background)
    assert (found.value.step, found.value.layer) == (2, "0")
    # In the background the record is complete when the next one is due.
    assert len(calls) == (4 if background else 2)
    again = pickle.loads(pickle.dumps(found.value))
    assert (again.step, again.layer, str(again)) == (2, "0", str(found.value))


def test_a_stopped_tracker_has_all_records():
    model = make_two_layers(10, 30, 2, seed=3)
    tracked = dln.torch.track(model, every=2, report=Report(alarms=[Alarm(is_late, action="stop")]))
    with pytest.raises(StopTraining, match="is_late is true"):
        descend(model, steps=10)
    tracked.close()
    assert tracked.trajectory().steps.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("alarm", "options", "text"),
    [
        (
            Alarm("stable_rank < 2", layers="head"),
            {},
            r"alarms\[0\]: 'head' fits none of the tracked layers 0",
        ),
        (Alarm("stable_rank < 2", layers=["0", "none*"]), {}, r"'none\*' fits none"),
        (Alarm("stable_rank < 2", of="change"), {"change": False}, r"of 'change', but changes are not"),
    ],
)
def test_an_alarm_that_nothing_can_set_off_is_refused(alarm, options, text):
    model = make_two_layers(10, 30, 2, seed=3)
    with pytest.raises(ValueError, match=text):
        dln.torch.track(model, report=Report(alarms=[alarm]), **options)
    assert not model[0]._forward_pre_hooks
    assert not model[0]._forward_hooks


def is_late(record):
    return record.step >= 4


def test_calls_of_the_tracker_stop_too():
    model = make_two_layers(10, 30, 2, seed=3)
    tracked = dln.torch.track(model, every=1, report=Report(alarms=[Alarm("stable_rank > 0", action="stop")]))
    with pytest.raises(StopTraining):
        tracked.advance()
    tracked.finish_step()  # once
    tracked.close()


RECORD = LayerRecord("0", "weights", 1, np.array([3.0, 4.0])[::-1], 5.0)


@pytest.mark.parametrize(
    ("text", "is_on"),
    [
        ("energy_share >= 1", True),
        ("energy_share>1", False),
        (" stable_rank <= 1.5625 ", True),
        ("stable_rank < 1.5625", False),
        ("largest_singular_value > 3.9e0", True),
    ],
)
def test_conditions_compare_a_quantity_with_a_number(text, is_on):
    assert Alarm(text).is_on(RECORD) is is_on


@pytest.mark.parametrize(
    "text",
    ["", "stable_rank", "stable_rank < nan", "rank < 3", "stable_rank == 3", "stable_rank < x", "norm() < 3",
     "__class__ < 3", "stable_rank < 3; print()", "3 > stable_rank", "stable_rank < 1 or 1"],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"when is .*; wanted one of largest_singular_value"):
        Alarm(text)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Alarm(3), TypeError, "when is 3"),
        (lambda: Alarm(is_late, action="pause"), ValueError, "action is 'pause'"),
        (lambda: Alarm(is_late, of="gradient"), ValueError, "of is 'gradient'"),
        (lambda: Alarm(is_late, layers=[3]), TypeError, "layers has 3"),
        (lambda: Report(sinks=[3]), TypeError, "sinks has a int"),
        (lambda: Report(alarms=["stable_rank < 3"]), TypeError, "alarms has a str"),
        (lambda: dln.torch.track(make_two_layers(10, 30, 2, seed=3), report=3), TypeError, "report is 3"),
    ],
)
def test_bad_reports_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


# -------------------------------------------------------------------------------------------------- sinks


def test_a_csv_file_has_a_row_for_every_metric(tmp_path):
    path = tmp_path / "metrics.csv"
    with sinks.CSVSink(path) as sink:
        sink.log(METRICS, 5)
        assert len(path.read_text().splitlines()) == 3  # readable during the training
    with sinks.CSVSink(path) as sink:
        sink.log({"weights/0/stable_rank": 0.1}, 10)
    rows = read_rows(path)
    assert [(row["step"], row["metric"], float(row["value"])) for row in rows] == [
        ("5", "weights/0/stable_rank", 1.5),
        ("5", "change/head.out/energy_share", 0.25),
        ("10", "weights/0/stable_rank", 0.1),
    ]
    with pytest.raises(ValueError, match="this CSVSink is closed"):
        sink.log(METRICS, 11)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"whose columns are \['a', 'b'\]"):
        sinks.CSVSink(tmp_path / "other.csv")


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's dependencies
def test_tensorboard_has_the_metrics(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is optional")
    with sinks.TensorBoardSink(tmp_path) as sink:
        sink.log(METRICS, 5)
        sink.log(METRICS, 10)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name, value in METRICS.items():
        assert [(each.step, each.value) for each in events.Scalars(name)] == [(5, value), (10, value)]


@pytest.mark.filterwarnings("ignore")
def test_wandb_has_the_metrics(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is optional")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with sinks.WandbSink(project="spectra", mode="offline", dir=str(tmp_path)) as sink:
        sink.log(METRICS, 5)
        assert sink._run.summary["weights/0/stable_rank"] == 1.5
        assert sink._run.step == 6  # row 5 is complete
    run = wandb.init(project="spectra", mode="offline", dir=str(tmp_path))
    sink = sinks.WandbSink(run)
    run.log({"loss": 1.0}, step=3)
    sink.log(METRICS, 5)
    assert run.step == 3  # the steps of the program are not changed
    run.log({"loss": 0.5}, step=6)
    assert dict(run.summary)["dlnfast/step"] == 5
    sink.close()
    run.log({"loss": 0.1}, step=7)  # still open
    run.finish()
    assert list(tmp_path.rglob("*.wandb"))


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_the_metrics(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is optional", exc_type=ImportError)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with sinks.MLflowSink(run_name="spectra") as sink:
        sink.log({**METRICS, "weights/layer[0]/stable_rank": 2.0}, 5)
        sink.log(METRICS, 10)
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient()
    for name, value in METRICS.items():
        history = client.get_metric_history(sink.run_id, name)  # threads write in any order
        assert sorted((each.step, each.value) for each in history) == [(5, value), (10, value)]
    assert client.get_metric_history(sink.run_id, "weights/layer_0_/stable_rank")[0].value == 2.0
    with mlflow.start_run() as run, sinks.MLflowSink() as sink:
        sink.log(METRICS, 1)
        assert sink.run_id == run.info.run_id


@pytest.mark.filterwarnings("ignore")
def test_trackio_has_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio", reason="trackio is optional", exc_type=ImportError)
    with sinks.TrackioSink(project="spectra", name="one") as sink:
        sink.log(METRICS, 5)
    [run] = trackio.Api().runs("spectra")
    assert run.name == "one"
    [path] = tmp_path.glob("spectra*.db")
    with contextlib.closing(sqlite3.connect(path)) as database:
        found = database.execute("SELECT step, metrics FROM metrics").fetchall()
    assert [(step, json.loads(metrics)) for step, metrics in found] == [(5, METRICS)]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboard", lambda: sinks.TensorBoardSink("runs")),
        ("wandb", lambda: sinks.WandbSink(project="spectra")),
        ("mlflow", lambda: sinks.MLflowSink()),
        ("trackio", lambda: sinks.TrackioSink(project="spectra")),
    ],
)
def test_an_error_names_the_missing_package(monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}.*pip install {package}"):
        make()


def test_the_module_imports_no_tracker(run_python):
    program = """
import sys
import dlnfast.integrations.sinks
print(sorted({"tensorboard", "wandb", "mlflow", "trackio", "torch"} & set(sys.modules)))
"""
    assert run_python(program).strip() == "[]"


# ---------------------------------------------------------------------------------------------- callbacks


class TestLightning:
    def fit(self, lightning, spectra, tmp_path, steps, logger=False):
        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = make_two_layers(10, 30, 2, seed=3)

            def training_step(self, batch, index):
                return self.net(batch).square().mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        trainer = lightning.Trainer(
            max_steps=steps,
            callbacks=[spectra],
            accelerator="cpu",
            logger=logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(draw_rows(steps * 4), batch_size=4))
        return trainer

    @pytest.mark.filterwarnings("ignore")  # of Lightning's, about this machine and small loaders
    def test_loggers_of_the_trainer_receive_the_metrics(self, lightning, tmp_path):
        from lightning.pytorch.loggers import CSVLogger

        from dlnfast.integrations.lightning import SpectralCallback

        self.fit(lightning, SpectralCallback(k=3, every=2), tmp_path, 5, CSVLogger(tmp_path, name="a"))
        [path] = tmp_path.rglob("metrics.csv")
        rows = read_rows(path)
        assert [int(row["step"]) for row in rows if row["weights/net.0/stable_rank"]] == [0, 2, 4, 5]

    @pytest.mark.filterwarnings("ignore")
    def test_an_alarm_stops_the_fit(self, lightning, tmp_path):
        from dlnfast.integrations.lightning import SpectralCallback

        sink = Memory()
        report = Report(sinks=[sink], alarms=[Alarm(is_late, action="stop")])
        spectra = SpectralCallback(k=3, every=2, report=report)
        trainer = self.fit(lightning, spectra, tmp_path, 9)
        assert trainer.global_step == 4
        assert "at step 4: is_late is true" in spectra.stopped
        assert spectra.trajectory().steps.tolist() == sink.steps == [0, 2, 4]


class TestTransformers:
    def train(self, transformers, spectra, folder, report_to=()):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = make_two_layers(10, 30, 2, seed=3)

            def forward(self, inputs):
                return {"loss": self.net(inputs).square().mean()}

        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=8,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to=list(report_to),
            disable_tqdm=True,
            use_cpu=True,
        )
        data = [{"inputs": row} for row in draw_rows(32)]
        trainer = transformers.Trainer(Model(), arguments, train_dataset=data, callbacks=[spectra])
        trainer.train()
        return trainer

    @pytest.mark.filterwarnings("ignore")
    def test_an_alarm_stops_the_training(self, transformers, tmp_path):
        from dlnfast.integrations.transformers import SpectralCallback

        sink = Memory()
        report = Report(sinks=[sink], alarms=[Alarm(is_late, action="stop")])
        spectra = SpectralCallback(k=3, every=2, report=report)
        trainer = self.train(transformers, spectra, tmp_path)
        assert trainer.state.global_step == 4
        assert spectra.trajectory().steps.tolist() == sink.steps == [0, 2, 4]

    @pytest.mark.filterwarnings("ignore")
    def test_tensorboard_of_the_trainer_receives_the_metrics(self, transformers, tmp_path):
        pytest.importorskip("tensorboard", reason="TensorBoard is optional")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        from dlnfast.integrations.transformers import SpectralCallback

        self.train(transformers, SpectralCallback(k=3, every=2), tmp_path, ["tensorboard"])
        events = EventAccumulator(str(tmp_path / "runs" / "spectra"))
        events.Reload()
        assert [each.step for each in events.Scalars("weights/net.0/stable_rank")] == [0, 2, 4, 6, 8]
