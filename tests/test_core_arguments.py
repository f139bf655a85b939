"""The compiled functions themselves: wrong arguments raise, whoever calls them; nothing crashes."""

from __future__ import annotations

import numpy as np
import pytest


def arguments(n_layers=2, dim=4, steps=3, **changes):
    """Return what dense_descent wants for n_layers square layers."""
    given = {
        "target": np.eye(dim),
        "input_gram": None,
        "least_squares": None,
        "loss_scale": 1.0,
        "loss_floor": 0.0,
        "learning_rate": [0.1] * n_layers,
        "weight_decay": [0.0] * n_layers,
        "momentum": [0.0] * n_layers,
        "steps": steps,
        "record_every": 1,
        "tolerance": -1.0,
        "n_threads": 0,
        "loss": np.zeros(steps + 1),
        "record_steps": np.zeros(steps + 1, np.int64),
        "counts": np.zeros(3, np.int64),
        "on_record": None,
        "on_progress": None,
        "snapshot_every": 0,
        "n_values": 0,
        "values": [],
        "left": [],
        "right": [],
        "snapshots": [],
        "rho": [1.0] * n_layers,
        "multiplicity": 3.0,
        "coupled": True,
        "core_records": [np.zeros((steps + 1, dim, dim)) for _ in range(n_layers)],
        "rho_records": np.zeros((steps + 1, n_layers)),
    }
    return {**given, **changes}


def matrices(n_layers=2, dim=4):
    return [np.eye(dim) for _ in range(n_layers)]


def test_the_arguments_are_right_as_they_stand(core):
    assert core.dense_descent(matrices(), arguments())[0] == "finished"
    assert core.reduced_descent(matrices(), arguments())[0] == "finished"


@pytest.mark.parametrize("engine", ["dense_descent", "reduced_descent"])
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"target": np.eye(5)}, ValueError),
        ({"target": np.eye(4, dtype=np.float32)}, TypeError),
        ({"target": np.asfortranarray(np.arange(16.0).reshape(4, 4))}, TypeError),
        ({"target": np.eye(4)[0]}, ValueError),
        ({"target": None}, TypeError),
        ({"input_gram": np.eye(3), "least_squares": np.eye(4)}, ValueError),
        ({"input_gram": np.eye(4)}, ValueError),
        ({"learning_rate": [0.1]}, ValueError),
        ({"weight_decay": [0.1] * 3}, ValueError),
        ({"momentum": []}, ValueError),
        ({"loss": np.zeros(3)}, ValueError),
        ({"loss": np.zeros(4, np.float32)}, TypeError),
        ({"record_steps": np.zeros(3, np.int64)}, ValueError),
        ({"counts": np.zeros(2, np.int64)}, ValueError),
        ({"steps": -1}, ValueError),
        ({"record_every": 0}, ValueError),
    ],
)
def test_wrong_arguments(core, engine, changes, error):
    with pytest.raises(error):
        getattr(core, engine)(matrices(), arguments(**changes))


@pytest.mark.parametrize("engine", ["dense_descent", "reduced_descent"])
def test_missing_arguments_and_matrices(core, engine):
    run = getattr(core, engine)
    for name in ("target", "loss", "learning_rate", "steps", "on_record"):
        given = arguments()
        del given[name]
        with pytest.raises(KeyError, match=name):
            run(matrices(), given)
    with pytest.raises(ValueError, match=r"is empty|wrong shape"):
        run([], arguments())
    with pytest.raises(ValueError, match=r"\[1\] has (the wrong )?shape"):
        run([np.eye(4), np.ones((4, 3))], arguments())
    frozen = np.eye(4)
    frozen.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        run([np.eye(4), frozen], arguments())
    with pytest.raises(TypeError):
        run([np.eye(4), np.eye(4, dtype=np.float32)], arguments())
    with pytest.raises(TypeError, match="not a NumPy array"):
        run([np.eye(4), [[1.0]]], arguments())


def test_records_of_the_wrong_shape(core):
    with pytest.raises(ValueError, match="records of this run"):
        core.dense_descent(matrices(), arguments(n_values=4, values=[np.zeros((4, 3)), np.zeros((4, 4))]))
    with pytest.raises(ValueError, match="records of this run"):
        core.dense_descent(matrices(), arguments(snapshot_every=1, snapshots=[np.zeros((2, 4, 4))] * 2))
    with pytest.raises(ValueError, match="rho has 1 values"):
        core.reduced_descent(matrices(), arguments(rho=[1.0]))
    with pytest.raises(ValueError, match="records of this run"):
        core.reduced_descent(matrices(), arguments(core_records=[np.zeros((3, 4, 4))] * 2))
    with pytest.raises((IndexError, ValueError)):
        core.dense_descent(matrices(), arguments(n_values=4, values=[np.zeros((4, 4))]))


def test_products_of_wrong_shapes(core):
    a, b = np.ones((3, 4)), np.ones((4, 5))
    for out in (np.ones((3, 4)), np.ones((4, 5)), np.ones((0, 0))):
        with pytest.raises(ValueError, match="result of a product has shape"):
            core.multiply(a, False, b, False, out)
    with pytest.raises(ValueError, match="inner size"):
        core.multiply(a, False, b, True, np.ones((3, 4)))
    with pytest.raises(TypeError):
        core.multiply(a, False, b.astype(np.float32), False, np.ones((3, 5)))
    with pytest.raises(ValueError, match="at most 64"):
        core.thin_multiply(np.ones((65, 4)), np.ones((4, 4)), False, np.ones((65, 4)))
    with pytest.raises(ValueError, match="thin block"):
        core.thin_multiply(np.ones((2, 3)), np.ones((4, 4)), False, np.ones((2, 4)))
    with pytest.raises(ValueError, match="wanted rows, columns or none"):
        core.thin_descend(
            np.ones((2, 4)),
            np.ones((2, 4)),
            np.ones((4, 4)),
            "both",
            np.ones((2, 4)),
            None,
            1.0,
            1.0,
            0.0,
            0.0,
        )
    with pytest.raises(ValueError, match="velocity"):
        core.thin_descend(
            np.ones((2, 4)),
            np.ones((2, 4)),
            np.ones((4, 4)),
            "none",
            None,
            np.ones((3, 4)),
            1.0,
            1.0,
            0.0,
            0.5,
        )


def test_decompositions_of_wrong_shapes(core):
    with pytest.raises(ValueError, match="singular values"):
        core.singular_values(np.ones((3, 4)), np.ones((1, 4)), None, None)
    with pytest.raises(ValueError, match="left singular vectors"):
        core.singular_values(np.ones((3, 4)), np.ones((1, 3)), np.ones((4, 3)), None)
    with pytest.raises(ValueError, match="superdiagonal"):
        core.bidiagonal_singular_values(np.ones(3), np.ones(3), 1)
    for k in (-1, 4):
        with pytest.raises(ValueError, match="k is"):
            core.bidiagonal_singular_values(np.ones(3), np.ones(2), k)


def test_a_callback_must_answer_with_a_truth_value(core):
    with pytest.raises((TypeError, RuntimeError)):
        core.dense_descent(matrices(), arguments(on_record=lambda step, loss: "yes"))
