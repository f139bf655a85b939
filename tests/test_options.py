# SPDX-License-Identifier: MIT
"""The options of a run: one list, from which signature, specifications, help and folders are made."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import get_type_hints

import numpy as np
import pytest

import dlnfast as dln
from dlnfast._config import spec
from dlnfast._training import options as options_module
from dlnfast._training.options import Options, Record, TrainOptions, only_keys_to_hash, spec_keys


def names(owner):
    return [field.name for field in fields(owner)]


def test_train_has_the_fields_of_the_options_as_parameters():
    parameters = inspect.signature(dln.train).parameters
    assert list(parameters) == ["problem", "weights", *names(Options), "checkpoint"]
    for field in fields(Options):
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY


def test_type_checkers_see_the_same_options():
    wanted = get_type_hints(Options)
    assert get_type_hints(TrainOptions) == {name: wanted[name] for name in names(Options)}


@pytest.mark.parametrize("owner", [Options, Record])
def test_every_option_has_a_text(owner):
    texts = options_module._parameter_texts(owner)
    assert list(texts) == names(owner)
    for name in names(Options):
        assert f"\n    {name} : " in dln.train.__doc__
    assert "**options" not in dln.train.__doc__


def test_specifications_have_every_option_but_functions():
    keys = spec_keys()
    plain = {*names(Options), *names(Record)} - {"record", "every", "callback", "progress"}
    assert set(keys) == plain | {"record_every"}
    for key, rule in keys.items():
        assert rule.required == (key in ("learning_rate", "steps"))
        assert rule.help
        assert rule.default is None or rule.accepts(rule.default)


def test_defaults_of_specifications_are_those_of_train():
    arguments = {"learning_rate": 0.1, "steps": 3}
    flat = {key: rule.default for key, rule in spec_keys().items()} | arguments
    assert Options.from_flat(flat) == Options(**arguments)
    assert Options.from_flat(Options(**arguments).to_flat()) == Options(**arguments)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("record_every", 7),
        ("singular_values", 3),
        ("vectors", True),
        ("weights_every", 2),
        ("tracking", "full"),
    ],
)
def test_keys_of_specifications_are_fields_of_the_record(key, value):
    options = Options.from_flat({"learning_rate": 0.1, "steps": 3, key: value})
    field = "every" if key == "record_every" else key
    assert options.record == replace(Record(), **{field: value})
    assert options.to_flat()[key] == value


def test_a_specification_that_records_no_singular_values():
    assert (
        Options.from_flat({"learning_rate": 0.1, "steps": 3, "singular_values": "none"}).record.n_values == 0
    )


@pytest.mark.parametrize(("text", "device"), [("torch", None), ("torch:cuda:1", "cuda:1"), ("dense", None)])
def test_an_engine_of_a_specification_may_name_its_device(text, device):
    sections = {
        "problem": {"kind": "low-rank-recovery", "dim": 6, "rank": 1},
        "weights": {"depth": 2},
        "train": {"learning_rate": 0.1, "steps": 3, "engine": text},
    }
    chosen = spec.check_spec(sections)
    assert (chosen.train["engine"], chosen.train["device"]) == (text.partition(":")[0], device)
    assert spec.train_options(chosen).engine == text
    if device is not None:
        apart = sections | {"train": sections["train"] | {"engine": "torch", "device": device}}
        assert spec.check_spec(apart) == chosen
        with pytest.raises(spec.SpecError, match=r"train\.device is 'cpu' but train\.engine is"):
            spec.check_spec(sections | {"train": sections["train"] | {"device": "cpu"}})


def test_later_options_are_stored_where_they_differ_from_their_default():
    stored = Options(learning_rate=0.1, steps=3).checked().stored()
    assert set(stored) == {
        *("steps", "record_every", "singular_values", "vectors", "tracking", "weights_every"),
        *("tolerance", "n_threads"),
    }
    assert set(only_keys_to_hash(Options(learning_rate=0.1, steps=3).to_flat())) == {
        *stored,
        *("learning_rate", "weight_decay", "momentum", "engine", "optimizer"),
    }


def test_options_are_checked_without_a_problem_or_weights():
    options = Options(learning_rate=[0.1, 0.2], steps=np.uint8(5), record=Record(every=10**9))
    checked = options.checked(n_layers=2)
    assert (type(checked.steps), checked.record.every) == (int, 5)
    with pytest.raises(dln.ShapeError, match="learning_rate"):
        options.checked(n_layers=3)
    with pytest.raises(TypeError, match=r"record is dict; wanted a dlnfast\.Record"):
        replace(options, record={"every": 2}).checked()


# ------------------------------------------------------------------------------- keywords of version 0.1.0


def call(function, **keywords):
    problem = dln.low_rank_recovery(6, 1)
    return function(problem, dln.orthogonal([6] * 3), learning_rate=0.1, steps=2, **keywords)


@pytest.mark.parametrize("function", [dln.train, dln.train_batch, dln.train_compressed])
@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("record_every", r"record=dln\.Record\(every=\.\.\.\)"),
        ("singular_values", r"record=dln\.Record\(singular_values=\.\.\.\)"),
        ("vectors", r"record=dln\.Record\(vectors=\.\.\.\)"),
        ("tracking", r"record=dln\.Record\(tracking=\.\.\.\)"),
        ("weights_every", r"record=dln\.Record\(weights_every=\.\.\.\)"),
        ("callback", r"record=dln\.Record\(callback=\.\.\.\)"),
        ("progress", r"record=dln\.Record\(progress=\.\.\.\)"),
        ("device", 'engine="torch:cuda:1"'),
    ],
)
def test_errors_for_old_keywords_name_the_new_ones(function, name, new):
    with pytest.raises(TypeError, match=f"^{name} is .* now: {new}$"):
        call(function, **{name: None})


def test_invalid_calls_raise_the_usual_errors_of_python():
    with pytest.raises(TypeError, match=r"train\(\) got an unexpected keyword argument 'rate'"):
        call(dln.train, rate=1)
    with pytest.raises(TypeError, match=r"train\(\) missing required keyword arguments: learning_rate"):
        dln.train(dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3), steps=2)


def test_a_batch_refuses_other_options_of_its_records():
    assert call(dln.train_batch)[0].steps.tolist() == [0, 2]
    assert call(dln.train_batch, record=Record())[0].steps.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="train_batch takes every and singular_values only"):
        call(dln.train_batch, record=Record(vectors=True))


def test_adaptive_rates_are_refused_in_batches():
    with pytest.raises(ValueError, match="learning_rate is adaptive, which is for the dense engine"):
        dln.train_batch(
            dln.low_rank_recovery(6, 1), dln.orthogonal([6] * 3), learning_rate="adaptive", steps=2
        )
