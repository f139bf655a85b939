# SPDX-License-Identifier: MIT
"""Compression of trained networks: best approximations, their errors, unchanged models on bad input."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from helpers.data_folder import find_data_folder
from helpers.torch_networks import relative_error
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

import dlnfast.torch as dt  # noqa: E402
from dlnfast.torch.low_rank import truncate  # noqa: E402
from dlnfast.torch.low_rank.moments import unfold_patches  # noqa: E402
from dlnfast.torch.low_rank.replacements import SHAPES, list_forms, read_tensor  # noqa: E402

pytestmark = pytest.mark.usefixtures("fixed_torch_seed")

F64 = torch.float64
BOUND = tolerance(np.float64, 64, 16)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with weight (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def tokens(n):
    return torch.randint(0, 23, (n, 6)).square() // 23  # of unequal frequencies


LAYERS = {
    "linear": (lambda: nn.Linear(17, 13), lambda n: torch.randn(n, 17)),
    "linear of a sequence": (lambda: nn.Linear(7, 20, bias=False), lambda n: torch.randn(n, 3, 7)),
    "gpt-2": (lambda: Conv1D(9, 14), lambda n: torch.randn(n, 4, 14)),
    "embedding": (lambda: nn.Embedding(23, 8, padding_idx=2), tokens),
    "conv1d": (lambda: nn.Conv1d(4, 9, 3, stride=2), lambda n: torch.randn(n, 4, 11)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), padding=1), lambda n: torch.randn(n, 4, 4, 5, 6)),
    "conv2d": (
        lambda: nn.Conv2d(5, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        lambda n: torch.randn(n, 5, 9, 8),
    ),
    "1 x 1 conv2d": (lambda: nn.Conv2d(9, 8, 1, bias=False), lambda n: torch.randn(n, 9, 3, 3)),
}
CASES = [(name, form.shape) for name, (make, _) in LAYERS.items() for form in list_forms(make())]


def make_case(name, n=12):
    make, draw = LAYERS[name]
    x = draw(n)
    return nn.Sequential(make()).to(F64), x.to(F64) if x.is_floating_point() else x


def matricise(layer, shape):
    form = next(f for f in list_forms(layer) if f.shape == shape)
    return form, form.to_matrix(read_tensor(layer))


# ------------------------------------------------------------------------------ best approximations


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_weight_error_is_that_of_lapack_and_the_function_that_of_its_truncation(name, shape):
    model, x = make_case(name)
    form, matrix = matricise(model[0], shape)
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    expected = copy.deepcopy(model)
    truncated = torch.from_numpy((left[:, :3] * values[:3]) @ right[:3])
    read_tensor(expected[0]).copy_(form.to_weight(truncated, read_tensor(model[0]).shape))
    report = dt.compress(model, "0", rank=3, shape=shape or "auto", held_out=x)
    layer = report.layers["0"]
    best = np.sqrt((values[3:] ** 2).sum() / (values**2).sum())
    assert abs(layer.weight_error - best) <= 1e-10 * best
    assert (layer.rank, layer.shape) == (3, shape)
    assert relative_error(model(x), expected(x)) <= BOUND
    assert abs(layer.held_out_error - report.function_error) <= 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)},
        {"padding": "same", "dilation": (1, 3)},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": "valid", "stride": 2, "bias": False},
    ],
)
def test_convolutions_of_full_rank_are_the_same_function(shape, settings):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, **settings)).to(F64)
    x = torch.randn(2, 3, 13, 12, dtype=F64)
    before = model(x)
    rank = min(matricise(model[0], shape)[1].shape)
    report = dt.compress(model, "0", tolerance=1e-12, shape=shape)
    assert report.layers["0"].rank == rank
    assert relative_error(model(x), before) <= BOUND


@pytest.mark.parametrize("bias", [True, False])
def test_data_gives_the_least_output_error_and_the_best_bias(bias):
    mixing = torch.randn(12, 12, dtype=F64) * torch.linspace(1, 0.05, 12, dtype=F64)
    x = torch.randn(80, 12, dtype=F64) @ mixing + 2.0
    model = nn.Sequential(nn.Linear(12, 9, bias=bias, dtype=F64))
    y = model(x).detach()
    weight = model[0].weight.detach()
    centred = x - x.mean(0) if bias else x
    tail = torch.linalg.svdvals(weight @ centred.T)[4:]
    report = dt.compress(model, "0", rank=4, data=x)
    wanted = float(tail.norm() / y.norm())
    assert abs(report.layers["0"].output_error - wanted) <= 1e-10 * wanted
    assert abs(relative_error(model(x), y) - wanted) <= 1e-10 * wanted


def test_directions_without_inputs_keep_the_projected_weight():
    x = torch.zeros(30, 10, dtype=F64)
    x[:, :4] = torch.randn(30, 4, dtype=F64)
    model = nn.Sequential(nn.Linear(10, 8, bias=False, dtype=F64))
    weight = model[0].weight.detach().clone()
    dt.compress(model, "0", rank=4, data=x)
    product = (model[0][1].weight @ model[0][0].weight).detach()
    assert relative_error(product[:, :4], weight[:, :4]) <= 1e-7
    projector = model[0][1].weight.detach() @ torch.linalg.pinv(model[0][1].weight.detach())
    assert relative_error(product, projector @ weight) <= BOUND
    assert float(product[:, 4:].norm()) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_data_reduces_the_output_error_of_convolutions(shape):
    x = torch.randn(60, 6, 7, 7, dtype=F64).cumsum(2).cumsum(3) * torch.linspace(2, 0.1, 6)[:, None, None]
    conv = nn.Conv2d(6, 7, 3, padding=1, dtype=F64)
    errors = {}
    for name, data in (("weights", None), ("data", x[:40])):
        model = nn.Sequential(copy.deepcopy(conv))
        report = dt.compress(model, "0", rank=3, shape=shape, data=data, held_out=x[40:])
        errors[name] = report.layers["0"].held_out_error
        assert abs(relative_error(model(x[40:]), conv(x[40:])) - errors[name]) <= 1e-9
    assert errors["data"] < 0.9 * errors["weights"]


def test_the_second_factor_of_a_convolution_is_optimal_for_the_first():
    x = torch.randn(20, 3, 6, 6, dtype=F64).cumsum(3)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False, dtype=F64))
    y = model(x).detach()
    dt.compress(model, "0", rank=2, shape="horizontal-first", data=x)
    first, second = model[0]
    patches = unfold_patches(second, first(x).detach())
    outputs = y.permute(0, 2, 3, 1).reshape(-1, 5)
    best = torch.linalg.lstsq(patches, outputs).solution
    least = float((patches @ best - outputs).norm() / outputs.norm())
    assert abs(relative_error(model(x), y) - least) <= 1e-8 * least


def test_auto_takes_the_best_shape_at_equal_parameters():
    conv = nn.Conv2d(6, 8, 3, dtype=F64)
    weight = torch.einsum("oay,aix->oiyx", torch.randn(8, 2, 3), torch.randn(2, 6, 3)).to(F64)
    conv.weight.data.copy_(weight)
    model = nn.Sequential(conv)
    layer = dt.compress(model, rank=1).layers["0"]
    assert (layer.shape, layer.rank) == ("horizontal-first", 62 // (24 + 18))
    model = nn.Sequential(copy.deepcopy(conv))
    layer = dt.compress(nn.Sequential(conv), tolerance=1e-6).layers["0"]
    assert (layer.shape, layer.rank) == ("horizontal-first", 2)


# ---------------------------------------------------------------------------------- sequential


def record_calls(layer, model, x):
    """Return the inputs and outputs of a layer, one entry per call."""
    calls = []
    handle = layer.register_forward_hook(lambda _, args, y: calls.append((args[0].detach(), y.detach())))
    model(x)
    handle.remove()
    return calls


@pytest.mark.parametrize("bias", [True, False])
def test_later_layers_are_reduced_rank_regressions_of_the_original_outputs(bias):
    x = torch.randn(200, 12, dtype=F64) @ torch.randn(12, 12, dtype=F64) + 1.0
    model = nn.Sequential(
        nn.Linear(12, 11, dtype=F64), nn.ReLU(), nn.Linear(11, 10, bias=bias, dtype=F64), nn.ReLU()
    )
    layer = model[2]
    y = record_calls(layer, model, x)[0][1]
    report = dt.compress(model, ["0", "2"], rank=3, data=x)
    inputs = record_calls(model[2], model, x)[0][0]
    means = (inputs.mean(0), y.mean(0)) if bias else (0.0, 0.0)
    a, b = inputs - means[0], y - means[1]
    second, weight = a.T @ a, layer.weight.detach()
    ridge = 0.01 * second.diagonal().mean() * torch.eye(11, dtype=F64)
    wanted = weight + (b - a @ weight.T).T @ a @ torch.linalg.inv(second + ridge)
    basis = torch.linalg.svd(wanted @ a.T)[0][:, :3]
    product = (model[2][1].weight @ model[2][0].weight).detach()
    assert relative_error(product, basis @ basis.T @ wanted) <= 1e-8
    found = model[2](inputs).detach()
    if bias:
        assert float((found - y).mean(0).norm()) <= BOUND * float(y.norm())
    error = report.layers["2"].output_error
    assert abs(error - relative_error(found, y)) <= 1e-10
    truncation = float((a @ (wanted - product).T).norm() / y.norm())
    assert abs(report.layers["2"].truncation_error - truncation) <= 1e-10
    assert truncation < error


def test_errors_do_not_add_up_in_a_deep_network():
    def make():
        torch.manual_seed(5)
        layers = [part for _ in range(8) for part in (nn.Linear(24, 24), nn.ReLU(inplace=True))]
        for layer in layers[::2]:
            layer.weight.data *= 2.0
        return nn.Sequential(nn.Identity(), *layers)

    x = torch.randn(900, 24)
    errors = {
        sequential: dt.compress(
            make(), rank=6, data=x[:600], held_out=x[600:], sequential=sequential, repeats=0
        )
        for sequential in (False, True)
    }
    assert errors[True].function_error < 0.95 * errors[False].function_error
    first = [report.layers["1"] for report in errors.values()]
    assert first[0] == first[1]


class Branches(nn.Module):
    """Calls layers in another order than that of their names, two of them with the same input."""

    def __init__(self):
        super().__init__()
        self.late, self.query, self.key, self.early = (nn.Linear(16, 16, dtype=F64) for _ in range(4))
        self.n_passes = []

    def forward(self, x):
        self.n_passes.append(0)
        x = self.early(x).relu()
        x = self.query(x) * self.key(x)
        self.n_passes[-1] += 1
        return self.late(x.tanh())


def test_layers_follow_the_order_of_execution_and_share_passes():
    model, x = Branches(), torch.randn(100, 16, dtype=F64)
    original = copy.deepcopy(model)
    report = dt.compress(model, rank=5, data=x, repeats=0)
    # The order; one for the first layer; then two for each of the two other groups, and two for the errors.
    assert len(model.n_passes) == 1 + 1 + 2 + 2 + 2
    assert model.n_passes[1:4] == [0, 0, 0]  # stopped early
    for name, layer in report.layers.items():
        before = record_calls(original.get_submodule(name), original, x)[0][1]
        after = record_calls(model.get_submodule(name), model, x)[0][1]
        assert abs(layer.output_error - relative_error(after, before)) <= 1e-10
    once = copy.deepcopy(original)
    once.n_passes.clear()
    dt.compress(once, rank=5, data=x, repeats=0, sequential=False)
    assert len(once.n_passes) == 1 + 2
    assert report.function_error < relative_error(once(x), original(x))


class Repeated(nn.Module):
    """Calls a layer as often as a number in its input says, or as the layer's own output does."""

    def __init__(self, by_output=False):
        super().__init__()
        self.first, self.again = nn.Linear(14, 14, dtype=F64), nn.Linear(14, 14, dtype=F64)
        self.by_output = by_output

    def forward(self, x):
        y = self.first(x)
        n = 1 + int(1e6 * float(y.detach().abs().sum())) % 5 if self.by_output else len(x) // 10
        for _ in range(n):
            y = self.again(y.relu())
        return y


def test_layers_may_be_called_several_times():
    model = Repeated()
    original = copy.deepcopy(model)
    batches = list(torch.randn(60, 14, dtype=F64).split([20, 30, 10]))
    layer = dt.compress(model, rank=4, data=batches).layers["again"]
    pairs = [
        (record_calls(original.again, original, x), record_calls(model.again, model, x)) for x in batches
    ]
    before, after = (torch.cat([y for pair in pairs for _, y in pair[i]]) for i in range(2))
    assert len(before) == 2 * 20 + 3 * 30 + 10
    assert abs(layer.output_error - relative_error(after, before)) <= 1e-10


def test_calls_that_do_not_correspond_have_no_output_error():
    report = dt.compress(
        Repeated(by_output=True), rank=4, data=list(torch.randn(400, 14, dtype=F64).split(20))
    )
    assert report.layers["first"].output_error > 0
    assert report.layers["again"].output_error is None
    assert "  -" in str(report)


# ---------------------------------------------------------------------------------- tolerances


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("with_data", [False, True])
def test_a_tolerance_gets_the_smallest_rank(name, shape, with_data):
    model, x = make_case(name, 40)
    data = x if with_data else None
    at = {}
    choice = {"layers": "0", "shape": shape or "auto", "data": data}
    found = dt.compress(copy.deepcopy(model), **choice, tolerance=0.3).layers["0"]
    for rank in (found.rank - 1, found.rank):
        if rank:
            layer = dt.compress(copy.deepcopy(model), **choice, rank=rank).layers["0"]
            at[rank] = layer.output_error if with_data else layer.weight_error
    assert at[found.rank] <= 0.3
    assert found.rank == 1 or at[found.rank - 1] > 0.3


# -------------------------------------------------------------------------------- large matrices

SPECTRA = {
    "Gaussian": None,
    "slow": torch.arange(1, 301) ** -0.5,
    "fast": 0.8 ** torch.arange(300.0),
    "equal values": torch.cat([torch.ones(40), torch.zeros(260)]),
    "orthogonal": torch.ones(300),
    "two groups": torch.cat([torch.full((25,), 3.0), torch.ones(275)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_iteration_finds_the_error_of_lapack(spectrum, dtype, monkeypatch):
    monkeypatch.setattr(truncate, "_DIRECT", 100)
    values = SPECTRA[spectrum]
    if values is None:
        matrix = torch.randn(320, 300, dtype=F64)
    else:
        left, right = (torch.linalg.qr(torch.randn(n, 300, dtype=F64))[0] for n in (320, 300))
        matrix = (left * values) @ right.T
    matrix = matrix.to(dtype)
    exact = torch.linalg.svdvals(matrix.double())
    for rank in (1, 20, 60):  # the last one from the Gram matrix
        basis = truncate.Approximation(matrix).find_basis(rank)
        assert basis.shape == (320, rank)
        found = truncate.squared_difference(matrix, basis, basis.T @ matrix.double()) ** 0.5
        least = float(exact[rank:].norm())
        floor = 100 * torch.finfo(dtype).eps * float(exact.norm())
        assert found - least <= 1e-6 * least + floor


@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-3])
def test_more_equal_singular_values_than_a_block_has_vectors(spread, monkeypatch):
    monkeypatch.setattr(truncate, "_DIRECT", 100)
    size, rank = 640, 60
    values = 0.5 * torch.arange(1, size + 1, dtype=F64) ** -0.1
    values[:50] = 1.0 + spread * torch.rand(50, dtype=F64)
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=F64))[0] for _ in range(2))
    matrix = (left * values) @ right.T
    basis = truncate.Approximation(matrix).find_basis(rank)
    found = truncate.squared_difference(matrix, basis, basis.T @ matrix)
    assert found <= (1 + 4e-6) * float(values.sort(descending=True).values[rank:].square().sum())


def test_the_iteration_does_not_depend_on_the_scale(monkeypatch):
    monkeypatch.setattr(truncate, "_DIRECT", 100)
    matrix = torch.randn(300, 300)
    for scale in (1e-25, 1.0, 1e25):
        basis = truncate.Approximation(scale * matrix).find_basis(10)
        error = truncate.squared_difference(matrix, basis, basis.T @ matrix.double()) ** 0.5
        assert abs(error / float(torch.linalg.svdvals(matrix.double())[10:].norm()) - 1) <= 1e-6


def test_large_layers_get_the_rank_of_a_tolerance(monkeypatch):
    monkeypatch.setattr(truncate, "_DIRECT", 100)
    left, right = (torch.linalg.qr(torch.randn(n, 300, dtype=F64))[0] for n in (300, 320))
    matrix = (left * torch.arange(1, 301) ** -1.0) @ right.T
    values = torch.linalg.svdvals(matrix)
    for target in (0.5, 0.1, 0.03, 1e-9):
        wanted = (
            1 + int(torch.nonzero(values.square().flip(0).cumsum(0).flip(0)[1:] <= target**2)[0])
            if (target > 1e-6)
            else 300
        )
        assert truncate.Approximation(matrix).find_rank(target**2) == wanted


def test_large_weighted_matrices_have_the_best_error(monkeypatch):
    monkeypatch.setattr(truncate, "_DIRECT", 100)
    x = torch.randn(500, 200, dtype=F64) * torch.linspace(2, 0.01, 200)
    for rows in (150, 260):
        matrix = torch.randn(rows, 200, dtype=F64)
        exact = torch.linalg.svdvals(matrix @ x.T)
        for rank in (5, 50):
            basis = truncate.Approximation(matrix, x.T @ x).find_basis(rank)
            found = float(((matrix - basis @ (basis.T @ matrix)) @ x.T).norm())
            assert abs(found / float(exact[rank:].norm()) - 1) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_stated_error_is_that_of_the_rounded_factors(dtype):
    model = nn.Sequential(nn.Linear(40, 30)).to(dtype)
    weight = model[0].weight.detach().double()
    report = dt.compress(model, "0", rank=30)
    product = model[0][1].weight.detach().double() @ model[0][0].weight.detach().double()
    assert model[0][0].weight.dtype == dtype
    assert abs(report.layers["0"].weight_error - relative_error(product, weight)) <= 1e-12


# ------------------------------------------------------------------------------- choices, reports


def small_network():
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))


def test_layers_that_would_not_lose_parameters_are_left_alone_unless_named():
    model = small_network()
    head = model[4]
    report = dt.compress(model, rank=4)
    assert list(report.layers) == ["0", "2"]
    assert report.unchanged == {"4": "rank 4 does not save parameters"}
    assert model[4] is head
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    named = small_network()
    layer = dt.compress(named, "4", rank=4).layers["4"]
    assert layer.parameters_after == 4 * 24 + 4 > layer.parameters_before == 84
    assert dt.compress(small_network(), tolerance=1e-9).layers == {}
    assert dt.compress(small_network(), "*", rank=4).unchanged.keys() == {"4"}


def test_ranks_by_name():
    model = small_network()
    report = dt.compress(model, rank={"2": 3, "0": 5})
    assert {name: layer.rank for name, layer in report.layers.items()} == {"0": 5, "2": 3}


def test_the_report_is_a_table():
    report = dt.compress(
        small_network(), rank=4, data=torch.randn(50, 30), held_out=[(torch.randn(9, 30), None)]
    )
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["layer", "kind", "rank"]
    assert lines[1].split()[:6] == ["0", "Linear", "4", "620", "->", "220"]
    assert any(line.startswith("error of the model's output on held_out: 0.") for line in lines)
    assert any(line.startswith("forward pass: ") for line in lines)
    assert lines[-1] == "unchanged: 4 (rank 4 does not save parameters)"
    assert report.seconds_before > 0
    assert dt.compress(small_network(), rank=4, data=torch.randn(9, 30), repeats=0).seconds_before is None


@pytest.mark.parametrize("kind", ["tensor", "pair", "list", "loader", "iterator", "mapping", "arguments"])
def test_batches_of_all_kinds_give_the_same_network(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_network()

        def forward(self, x, scale=1.0):
            return {"loss": torch.zeros(()), "logits": scale * self.net(x)}

    x, labels = torch.randn(60, 30), torch.zeros(60)
    halves = [(x[:30], labels[:30]), [x[30:], labels[30:]]]
    data = {
        "tensor": x,
        "pair": (x, labels),
        "list": halves,
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 30),
        "iterator": iter(halves),
        "mapping": {"x": x},
        "arguments": [((x, 2.0), labels)],
    }[kind]
    torch.manual_seed(3)
    reference, model = Model(), Model()
    model.load_state_dict(reference.state_dict())
    wanted = dt.compress(reference, rank=4, data=[(x,)])
    found = dt.compress(model, rank=4, data=data)
    assert abs(found.function_error - wanted.function_error) <= 1e-5
    assert relative_error(model(x)["logits"], reference(x)["logits"]) <= 1e-4


def test_flags_precision_and_random_states_are_kept():
    model = small_network().to(F64)
    model[2].weight.requires_grad_(False)
    model.train()
    model[2].eval()
    x = torch.randn(20, 30, dtype=F64)
    state = torch.get_rng_state()
    dt.compress(model, "*", rank=3, data=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model[2].parameters()] == [False, False, True]
    assert model[0].training
    assert not model[2].training
    assert all(p.dtype == F64 for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_with_two_names_is_replaced_in_both_places():
    layer = nn.Linear(12, 12)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    report = dt.compress(model, rank=3, data=torch.randn(9, 12))
    assert list(report.layers) == ["0"]
    assert model[0] is model[2]
    assert isinstance(model[0], nn.Sequential)


def test_an_embedding_keeps_its_padding_and_follows_the_frequencies():
    model, _ = make_case("embedding")
    frequent = torch.arange(6).repeat(50, 1)
    weight = model[0].weight.detach().clone()
    dt.compress(model, "0", rank=5, data=frequent)
    assert model[0][0].padding_idx == 2
    assert float(model(torch.tensor([[2]])).detach().norm()) == 0.0
    # Five nonzero rows are seen, so rank 5 loses nothing of them.
    assert relative_error(model(torch.arange(6)), weight[:6]) <= BOUND


def test_large_errors_of_weights_need_not_matter():
    x = torch.randn(100, 3) @ torch.randn(3, 64)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    layer = dt.compress(model, "0", rank=3, data=x[:50], held_out=x[50:]).layers["0"]
    assert layer.weight_error > 0.9
    assert layer.held_out_error < 1e-5


# ------------------------------------------------------------------------------------- bad input


class Reader(nn.Module):
    """Has one layer, which subclasses read in several ways."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x):
        return self.fc(x)


class WeightReader(Reader):
    def forward(self, x):
        return x @ self.fc.weight


class TypeReader(Reader):
    def forward(self, x):
        return self.fc(x.to(self.fc.weight.dtype))


class HiddenReader(Reader):
    def forward(self, x):
        layer = next(self.children())
        return x[..., : layer.in_features] + self.fc(x)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


def tied():
    model = nn.Sequential(nn.Embedding(12, 12), nn.Linear(12, 12, bias=False))
    model[1].weight = model[0].weight
    return model


def poisoned(where):
    model = small_network()
    with torch.no_grad():
        (model[2].weight if where == "weight" else model[2].bias).view(-1)[3] = float("nan")
    return model


def hooked():
    model = small_network()
    model[0].register_forward_hook(lambda *_: None)
    return model


class Partly(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(30, 30), nn.Linear(30, 30)

    def forward(self, x):
        return self.used(x)


def quantised():
    model = small_network()
    model[0].weight = nn.Parameter(torch.zeros(20, 30, dtype=torch.int8), requires_grad=False)
    return model


X = torch.zeros(4, 30)
BAD = {
    "no model": (lambda: 3, {"rank": 2}, TypeError, "model is int"),
    "rank and tolerance": (small_network, {"rank": 2, "tolerance": 0.1}, ValueError, "exactly one"),
    "neither": (small_network, {}, ValueError, "rank is None and tolerance is None; wanted exactly one"),
    "rank 0": (small_network, {"rank": 0}, ValueError, "rank is 0"),
    "rank 2.5": (small_network, {"rank": 2.5}, TypeError, "rank is 2.5"),
    "rank above a side": (
        small_network,
        {"layers": "4", "rank": 5},
        ValueError,
        "'4' has no rank 5.*at most 4",
    ),
    "rank above all sides": (small_network, {"rank": 99}, ValueError, "above the smaller side of every"),
    "rank of no layer": (small_network, {"rank": {"9": 2}}, ValueError, "'9' fits none"),
    "rank by a glob": (small_network, {"rank": {"*": 2}}, ValueError, r"rank: '\*' fits none.* 0, "),
    "ranks and layers": (small_network, {"layers": "0", "rank": {"0": 2}}, ValueError, "layers=None"),
    "no ranks": (small_network, {"rank": {}}, ValueError, "rank is empty"),
    "tolerance 1": (small_network, {"tolerance": 1.0}, ValueError, "tolerance is 1"),
    "tolerance nan": (small_network, {"tolerance": float("nan")}, ValueError, "tolerance is nan"),
    "shape": (small_network, {"rank": 2, "shape": "square"}, ValueError, "shape is 'square'"),
    "sequential": (small_network, {"rank": 2, "data": X, "sequential": "yes"}, TypeError, "sequential is"),
    "repeats": (small_network, {"rank": 2, "repeats": -1}, ValueError, "repeats is -1"),
    "no such layer": (small_network, {"layers": "nine", "rank": 2}, ValueError, "'nine' fits none"),
    "the model itself": (
        lambda: nn.Linear(9, 9),
        {"rank": 2, "layers": "weight"},
        ValueError,
        "model itself",
    ),
    "shared": (tied, {"layers": "1", "rank": 2}, ValueError, "'1' shares its weight with '0'"),
    "computed": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(9, 9))),
        {"layers": "0", "rank": 2},
        ValueError,
        "computed by a parametrization",
    ),
    "quantised": (quantised, {"layers": "0", "rank": 2}, TypeError, "torch.int8"),
    "weight nan": (
        lambda: poisoned("weight"),
        {"rank": 2},
        ValueError,
        "'2' has a weight that is not finite",
    ),
    "bias nan": (lambda: poisoned("bias"), {"rank": 2}, ValueError, "'2' has a bias that is not finite"),
    "hooks": (hooked, {"layers": "0", "rank": 2}, ValueError, "has hooks"),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)),
        {"layers": "0", "rank": 2},
        TypeError,
        "2 groups",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3)),
        {"layers": "0", "rank": 2},
        TypeError,
        "ConvTranspose2d; wanted",
    ),
    "shape of a conv1d": (
        lambda: nn.Sequential(nn.Conv1d(8, 8, 3)),
        {"layers": "0", "rank": 2, "shape": "vertical-first"},
        ValueError,
        "no shape",
    ),
    "attention in": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        {"layers": "0.q", "rank": 2},
        TypeError,
        "in_proj or out_proj",
    ),
    "attention out": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
        {"layers": "0.out_proj", "rank": 2},
        TypeError,
        "in_proj or out_proj",
    ),
    "encoder layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)),
        {"layers": "0.linear1", "rank": 2},
        TypeError,
        "read by a TransformerEncoderLayer",
    ),
    "recurrent": (
        lambda: nn.Sequential(nn.LSTM(8, 8)),
        {"layers": "0.weight_ih_l0", "rank": 2},
        TypeError,
        "weight of a LSTM",
    ),
    "own forward": (
        lambda: nn.Sequential(Own(9, 9)),
        {"layers": "0", "rank": 2},
        TypeError,
        "forward pass is its own",
    ),
    "max_norm": (
        lambda: nn.Sequential(nn.Embedding(9, 9, max_norm=1.0)),
        {"layers": "0", "rank": 2},
        ValueError,
        "max_norm",
    ),
    "weight read": (
        lambda: WeightReader(),
        {"layers": "fc", "rank": 2},
        TypeError,
        "read by a WeightReader",
    ),
    "type read": (lambda: TypeReader(), {"layers": "fc", "rank": 2}, TypeError, "attribute 'weight'"),
    "read where no code shows it": (
        lambda: HiddenReader(),
        {"layers": "fc", "rank": 2, "data": torch.zeros(3, 12)},
        AttributeError,
        "in_features",
    ),
    "meta": (
        lambda: nn.Sequential(nn.Linear(9, 9, device="meta")),
        {"layers": "0", "rank": 2},
        ValueError,
        "meta device",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(9)),
        {"layers": "0", "rank": 2},
        TypeError,
        "not initialised",
    ),
    "not called": (
        Partly,
        {"layers": "spare", "rank": 2, "data": X},
        ValueError,
        "does not reach layer 'spare'",
    ),
    "data nan": (
        small_network,
        {"rank": 2, "data": X + float("nan")},
        ValueError,
        "data: the input of layer '0'",
    ),
    "held out nan": (
        small_network,
        {"rank": 2, "data": X, "held_out": [X + float("inf")]},
        ValueError,
        "held_out: the output of the model",
    ),
    "no batch": (small_network, {"rank": 2, "data": []}, ValueError, "data is empty"),
    "data of another kind": (small_network, {"rank": 2, "data": 4}, TypeError, "data is int"),
    "batch of another kind": (small_network, {"rank": 2, "data": ["x"]}, TypeError, "inputs of type str"),
    "batch of three": (small_network, {"rank": 2, "data": [(X, X, X)]}, TypeError, "batch of 3 parts"),
    "data of another width": (small_network, {"rank": 2, "data": X[:, :7]}, RuntimeError, "mat1 and mat2"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_and_leaves_the_model_as_it_was(case):
    make, arguments, error, match = BAD[case]
    model = make()
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    parameters = {n: id(p) for n, p in model.named_parameters()} if modules else {}
    hooks = [len(m._forward_pre_hooks) for m in modules.values()]
    with pytest.raises(error, match=match):
        dt.compress(model, **arguments)
    if modules:
        assert dict(model.named_modules()) == modules
        assert {n: id(p) for n, p in model.named_parameters()} == parameters
        assert [len(m._forward_pre_hooks) for m in modules.values()] == hooks


def test_the_default_choice_skips_what_cannot_be_replaced_and_says_why():
    model = Partly()
    model.attention = nn.MultiheadAttention(12, 2)
    model.groups = nn.Conv2d(8, 8, 3, groups=2)
    spare = model.spare
    report = dt.compress(model, rank=2, data=torch.randn(9, 30))
    assert list(report.layers) == ["used"]
    assert model.spare is spare
    assert report.unchanged["spare"] == "is not called on data"
    assert "MultiheadAttention" in report.unchanged["attention.q"]
    assert "MultiheadAttention" in report.unchanged["attention.out_proj"]
    assert "2 groups" in report.unchanged["groups"]


# ----------------------------------------------------------------------------- plain PyTorch


def compressed_network():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 20), nn.Linear(20, 5)
    )
    x = torch.randn(4, 3, 6, 6)
    dt.compress(model, "*", rank=2, data=x, shape="horizontal-first")
    return model.eval(), x


def test_whole_models_load_where_dlnfast_is_not_installed(tmp_path):
    model, x = compressed_network()
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['dlnfast'] = None\n"
        f"import torch; model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.allclose(model(x), y, atol=1e-6); print('same')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


def test_compressed_models_can_be_exported():
    model, x = compressed_network()
    program = torch.export.export(model, (x,))
    assert relative_error(program.module()(x), model(x)) <= 1e-5


@pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None,
    reason="onnx and onnxscript are optional",
)
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_compressed_models_can_be_exported_to_onnx(tmp_path):
    model, x = compressed_network()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True)
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_transformers_of_hugging_face():
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    batch = {"input_ids": torch.randint(0, 50, (8, 12)), "labels": torch.randint(0, 50, (8, 12))}
    before = model(**batch).logits.detach()
    report = dt.compress(model, "transformer.h.*", rank=8, data=[batch])
    assert {layer.kind for layer in report.layers.values()} == {"Conv1D"}
    assert len(report.layers) == 8
    assert abs(relative_error(model(**batch).logits, before) - report.function_error) <= 1e-4
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    report = dt.compress(model, "*.query", rank=4, data={"input_ids": batch["input_ids"]})
    assert list(report.layers) == ["encoder.layer.0.attention.self.query"]


# --------------------------------------------------------------------------- trained networks


@pytest.mark.parametrize("kind", ["mlp", "vgg", "vit"])
def test_data_reduces_the_held_out_errors_of_trained_networks(kind):
    file, name = (
        ("fashion_mnist_full.npz", "fashion-mnist") if kind == "mlp" else ("cifar10_jpeg.npz", "cifar10")
    )
    folder = find_data_folder(file)
    images = dt.load_images(name, path=folder, per_class=30, test_per_class=10)
    rule, rate = "sgd", 0.02
    if kind == "mlp":
        model = dt.MLP([784, 128, 128, 10], bias=True, seed=0)
    elif kind == "vgg":
        model = dt.VGG("vgg11", width=0.125, seed=0)
    else:
        model, rule, rate = dt.ViT(dim=48, depth=2, n_heads=2, patch_size=8, seed=0), "adamw", 2e-3
    dt.Trainer(model, epochs=3, learning_rate=rate, batch_size=50, optimizer=rule).fit(*images.train)
    data, held_out = images.train.inputs, images.test.inputs
    reports = [
        dt.compress(copy.deepcopy(model), rank=4, data=given, held_out=held_out, repeats=0)
        for given in (None, data)
    ]
    assert reports[1].function_error < 0.9 * reports[0].function_error
    for name, layer in reports[1].layers.items():
        assert layer.held_out_error < reports[0].layers[name].held_out_error, name
