# SPDX-License-Identifier: MIT
"""Records of `track` contain the weights between two training steps, for training loops of all types."""

from __future__ import annotations

import copy
import io
import itertools
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
from tolerances import tolerance  # noqa: E402
from torch import nn  # noqa: E402

import dlnfast as dln  # noqa: E402
from dlnfast.torch import track  # noqa: E402

WIDTHS = (12, 20, 8, 3)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(m, n, dtype=dtype) for m, n in itertools.pairwise(WIDTHS)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def batch(seed=1, dtype=torch.float64):
    return torch.randn(16, WIDTHS[0], generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(model, seed=1):
    first = next(model.parameters())
    return (model(batch(seed, first.dtype)) - 1).square().mean()


class Witness:
    """Copies the weights after every step of the test, to compare them with the records."""

    def __init__(self, model, tracked):
        self.model, self.tracked = model, tracked
        self.copies = {}
        self.keep()

    def keep(self):
        names = self.tracked.trajectory().layer_names if not self.copies else self.names
        self.names = names
        self.copies[len(self.copies)] = [self.model.get_submodule(n).weight.detach().clone() for n in names]

    def compare(self, steps, of=("weights", "change")):
        """Assert that the records at these steps are the singular values of the copied weights."""
        for which in of:
            run = self.tracked.trajectory(which)
            assert run.steps.tolist() == list(steps)
            for i, name in enumerate(self.names):
                values, errors = run.singular_values(name), run.singular_value_errors(name)
                scale = float(torch.linalg.matrix_norm(self.copies[0][i].double()))
                eps = tolerance(values.dtype, max(WIDTHS))
                for record, step in enumerate(run.steps):
                    matrix = self.copies[int(step)][i].double()
                    if which == "change":
                        matrix = matrix - self.copies[0][i].double()
                    exact = torch.linalg.svdvals(matrix).numpy()[: values.shape[1]]
                    assert np.all(np.abs(values[record] - exact) <= errors[record] + eps * scale)


# ------------------------------------------------------------------------------- kinds of training steps


class Lookahead(torch.optim.Optimizer):
    """Averages the weights of another optimizer after its step."""

    def __init__(self, base):
        self.base = base
        super().__init__(base.param_groups, {})
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    def step(self, closure=None):
        self.base.step()
        with torch.no_grad():
            for slow, p in zip(self.slow, (p for g in self.param_groups for p in g["params"]), strict=True):
                p.copy_(slow.lerp_(p, 0.5))


class Doubled(torch.optim.SGD):
    """Calls the step of its base class, and changes the weights once more: two hooked steps in one."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.99)


class SharpnessAware(torch.optim.Optimizer):
    """Moves the weights along the gradient, computes a second gradient there, and steps from the start."""

    def __init__(self, base):
        self.base = base
        super().__init__(base.param_groups, {})

    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
        self.base.step()


class AveragedEvaluation(torch.optim.SGD):
    """Has a mode with averages as weights, as schedule-free optimizers do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.sums = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            group["train_mode"] = True

    def _swap(self):
        with torch.no_grad():
            for averaged, p in zip(self.sums, self.param_groups[0]["params"], strict=True):
                values = p.clone()
                p.copy_(averaged)
                averaged.copy_(values)

    def eval(self):
        self.param_groups[0]["train_mode"] = False
        self._swap()

    def train(self):
        self.param_groups[0]["train_mode"] = True
        self._swap()


def plainly(model, optimizers, after=None):
    """Return a step of one or several optimizers, with changes of the weights after them."""

    def step(number):
        loss_of(model, number).backward()
        for optimizer in optimizers:
            optimizer.step()
        if after is not None:
            with torch.no_grad():
                after()
        model.zero_grad()

    return step


def two_optimizers(model):
    muon = getattr(torch.optim, "Muon", None)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    first = torch.optim.SGD(matrices, lr=0.1) if muon is None else muon(matrices, lr=0.02)
    return plainly(model, [first, torch.optim.AdamW(vectors, lr=0.01)])


def two_optimizers_of_layers(model):
    return plainly(
        model,
        [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[2:].parameters(), lr=0.05)],
    )


def cleared_in_between(model):
    """Gradients of one part are cleared before the other part steps."""
    first = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2:].parameters(), lr=0.1)

    def step(number):
        loss_of(model, number).backward()
        first.step()
        first.zero_grad(set_to_none=number % 2 == 0)
        nn.utils.clip_grad_norm_(model[2:].parameters(), 0.5)
        second.step()
        model.zero_grad()

    return step


def in_the_backward_pass(model):
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)
    return lambda number: loss_of(model, number).backward()


def lookahead(model):
    return plainly(model, [Lookahead(torch.optim.SGD(model.parameters(), lr=0.3))])


def subclass(model):
    return plainly(model, [Doubled(model.parameters(), lr=0.1)])


def with_closure(model, optimizer):
    """Return a step of an optimizer that calls the loss function."""

    def step(number):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, number)
            loss.backward()
            return loss

        optimizer.step(closure)

    return step


def sharpness_aware(model):
    return with_closure(model, SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1)))


def lbfgs(model):
    return with_closure(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4))


def clipped(model):
    def after():
        for p in model.parameters():
            p.clamp_(-0.2, 0.2)

    return plainly(model, [torch.optim.SGD(model.parameters(), lr=0.3)], after)


def normalised(model):
    def after():
        for p in model.parameters():
            if p.ndim == 2:
                p.div_(torch.linalg.vector_norm(p, dim=1, keepdim=True))

    return plainly(model, [torch.optim.Adam(model.parameters(), lr=0.05)], after)


def replaced_data(model):
    """Weights are replaced after the step through ``.data``."""

    def after():
        for p in model.parameters():
            p.data = 0.97 * p.data

    return plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)], after)


def accumulated(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(number):
        for part in range(3):
            (loss_of(model, 10 * number + part) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_evaluations(model):
    """Averages are swapped in for an evaluation after every step."""
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(number):
        loss_of(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
        saved_state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for mean, p in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(p, 0.1)
        model.load_state_dict(average.state_dict())
        with torch.no_grad():
            loss_of(model, number)
        model.load_state_dict(saved_state)

    return step


def averaged_copy(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return plainly(model, [optimizer], lambda: average.update_parameters(model))


def checkpointed_activations(model):
    """The forward pass runs again within the backward pass."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(number):
        hidden = torch.utils.checkpoint.checkpoint(model[:4], batch(number), use_reentrant=False)
        model[4](hidden).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


WAYS = (
    two_optimizers,
    two_optimizers_of_layers,
    cleared_in_between,
    in_the_backward_pass,
    lookahead,
    subclass,
    sharpness_aware,
    lbfgs,
    clipped,
    normalised,
    replaced_data,
    accumulated,
    with_evaluations,
    averaged_copy,
    checkpointed_activations,
)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_records_are_the_states_between_steps(way, every):
    model = network()
    step = way(model)
    tracked = track(model, k=3, every=every)
    witness = Witness(model, tracked)
    for number in range(1, 6):
        step(number)
        witness.keep()
    tracked.close()
    assert tracked.step == 5
    witness.compare(sorted({*range(0, 6, every), 5}))


@pytest.mark.parametrize("way", [two_optimizers_of_layers, in_the_backward_pass, lookahead, accumulated])
def test_records_can_be_read_during_training(way):
    model = network()
    step = way(model)
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    for number in range(1, 5):
        step(number)
        witness.keep()
        witness.compare(range(number + 1))


def test_a_record_read_during_a_step_is_replaced():
    model = network()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    for number in range(1, 4):
        loss_of(model, number).backward()
        first.step()
        assert tracked.trajectory().steps.tolist() == list(range(number + 1))  # of half a step
        second.step()
        model.zero_grad()
        witness.keep()
    witness.compare(range(4))


def test_a_chosen_optimizer_counts_in_any_order_of_two():
    for order in (0, 1):
        model = network()
        pair = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:2], model[2:])]
        tracked = track(model, k=3, every=2, optimizer=pair[order])
        witness = Witness(model, tracked)
        step = plainly(model, pair)
        for number in range(1, 6):
            step(number)
            witness.keep()
        tracked.close()
        witness.compare([0, 2, 4, 5])


# --------------------------------------------------------------------------- optimizers that are added later


def test_added_parameter_groups_are_tracked():
    model = network()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    tracked = track(model, ["0", "2"], k=3, every=1)
    witness = Witness(model, tracked)
    step = plainly(model, [optimizer])
    step(1)
    assert tracked.step == 0  # it contains none of the tracked weights yet
    optimizer.add_param_group({"params": model[2].parameters()})
    for number in (2, 3):
        step(number)
        witness.keep()
    optimizer.add_param_group({"params": model[0].parameters()})
    step(4)
    witness.keep()
    tracked.close()
    witness.compare(range(4))


def test_thawed_layers_are_tracked():
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    step = plainly(model, [optimizer])
    for number in range(1, 6):
        if number == 3:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": model[0].parameters()})
        step(number)
        witness.keep()
    tracked.close()
    witness.compare(range(6))
    change = tracked.trajectory("change").singular_values("0")
    assert not change[:3].any()
    assert change[3:].any()


@pytest.mark.parametrize("closures", [False, True])
def test_optimizers_of_later_phases_continue_the_count(closures):
    model = network()
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    for make in (
        lambda: torch.optim.SGD(model[4].parameters(), lr=0.1),
        lambda: torch.optim.Adam(model.parameters(), lr=0.01),
        lambda: torch.optim.SGD(model[:2].parameters(), lr=0.1),
    ):
        optimizer = make()
        for number in range(2):

            def closure(number=number, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model, number)
                loss.backward()
                return loss

            if closures:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            witness.keep()
    tracked.close()
    witness.compare(range(7))
    assert tracked.trajectory().config["optimizers"] == ["SGD", "Adam"]


def test_optimizers_with_a_backward_pass_between_them_take_separate_steps():
    """Two optimizers as in adversarial training."""
    model = network()
    pair = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:2], model[2:])]
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    for number in range(3):
        for optimizer in pair:
            model.zero_grad()
            loss_of(model, number).backward()
            optimizer.step()
            witness.keep()
    tracked.close()
    witness.compare(range(7))


def test_skipped_steps_are_not_counted():
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    for number in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, number)
        scaler.scale(loss * float("inf") if number == 2 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if number != 2:
            witness.keep()
    tracked.close()
    witness.compare(range(5))


# ---------------------------------------------------------------------------------- losses


def test_losses_of_a_closure_belong_to_the_weights_before_the_step():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    wanted = []
    with track(model, k=2, every=1) as tracked:
        for _ in range(3):
            wanted.append(float(loss_of(model).detach()))

            def closure():
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward()
                tracked.log_loss(loss)
                return loss

            optimizer.step(closure)
    run = tracked.trajectory()
    assert run.loss_steps.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(run.loss, wanted)


def test_losses_of_future_steps_are_refused():
    model = network()
    tracked = track(model, k=2, every=1)
    plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)])(1)
    with pytest.raises(ValueError, match="step is 2, but 1 steps were taken"):
        tracked.log_loss(0.5, 2)
    with pytest.raises(ValueError, match=r"loss has shape \(2,\); wanted one number"):
        tracked.log_loss(torch.ones(2))
    tracked.log_loss(torch.ones(1, 1), 1)
    assert tracked.trajectory().loss_steps.tolist() == [1]


# ------------------------------------------------------------------------- averages, replaced weights


def test_swapped_in_averages_are_not_recorded():
    model = network()
    optimizer = AveragedEvaluation(model.parameters(), lr=0.1)
    tracked = track(model, k=3, every=2)
    witness = Witness(model, tracked)
    step = plainly(model, [optimizer])
    for number in range(1, 6):
        step(number)
        witness.keep()
        optimizer.eval()
        loss_of(model).detach()
        tracked.trajectory()  # the record that is due waits for the weights
        if number < 5:
            optimizer.train()
    with pytest.warns(RuntimeWarning, match="step 5 has no record: AveragedEvaluation is in evaluation mode"):
        tracked.close()
    witness.compare([0, 2, 4])


def test_schedule_free_optimizers_are_recorded_in_training_mode():
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is optional")
    model = network()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
    optimizer.train()
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    step = plainly(model, [optimizer])
    for number in range(1, 5):
        step(number)
        witness.keep()
        optimizer.eval()
        optimizer.train()
    tracked.close()
    # Switching to the averages and back rounds.
    witness.compare(range(5))


def test_weights_replaced_after_the_last_step_are_not_recorded():
    model = network()
    best = copy.deepcopy(model.state_dict())
    tracked = track(model, k=3, every=2)
    witness = Witness(model, tracked)
    step = plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    for number in range(1, 4):
        step(number)
        tracked.finish_step()
        witness.keep()
    model.load_state_dict(best)
    with pytest.warns(RuntimeWarning, match="step 3 has no record: the weights were replaced after it"):
        tracked.close()
    witness.compare([0, 2])


def test_tracking_continues_with_a_replacement_of_the_same_shape():
    model = network()
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)])(1)
    witness.keep()
    tracked.finish_step()
    model[2] = nn.Linear(WIDTHS[1], WIDTHS[2], dtype=torch.float64)
    step = plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    for number in (2, 3):
        step(number)
        witness.keep()
        if number == 2:
            with pytest.warns(RuntimeWarning, match="layer 2 was replaced .* step 2: its records continue"):
                tracked.finish_step()
    tracked.close()
    witness.compare(range(4))


def test_a_replacement_of_another_shape_gives_a_warning():
    model = network()
    tracked = track(model, "4", k=3, every=1)
    step = plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    step(1)
    model[4] = nn.Linear(WIDTHS[2], 5, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="layer 4 was replaced .* the old weight, which nothing trains"):
        tracked.close()


def test_tracking_continues_with_a_new_parameter():
    model = network()
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    for number in range(1, 4):
        model[2].weight = nn.Parameter(model[2].weight.detach() + 0.1)
        plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)])(number)
        witness.keep()
        tracked.finish_step()
    tracked.close()
    witness.compare(range(4))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the older of the two is deprecated
@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("kind", ["parametrization", "hook"])
def test_computed_weights_are_recorded_after_the_step(kind, look):
    """Spectral normalisation updates its vectors in every forward pass; a record uses those of its step."""
    normalise = (
        nn.utils.parametrizations.spectral_norm if kind == "parametrization" else nn.utils.spectral_norm
    )
    model = network()
    model[2] = normalise(model[2])
    tracked = track(model, "2", k=3, every=2)
    step = plainly(model, [torch.optim.SGD(model.parameters(), lr=0.3)])

    def weight():
        model.eval()
        with torch.no_grad():
            model(batch())  # a hook computes the weight then
            values = torch.linalg.svdvals(model[2].weight.detach())[:3].numpy()
        model.train()
        return values

    copies = [weight()]
    for number in range(1, 6):
        step(number)
        copies.append(weight())
        buffers = [buffer.clone() for buffer in model.buffers()]
        if look:
            tracked.trajectory()
        assert all(torch.equal(*pair) for pair in zip(buffers, model.buffers(), strict=True))
    tracked.close()
    run = tracked.trajectory()
    assert run.steps.tolist() == [0, 2, 4, 5]
    for record, number in enumerate(run.steps):
        np.testing.assert_allclose(run.singular_values(1)[record], copies[number], rtol=tolerance(float, 20))


# ------------------------------------------------------------------------------- warnings and errors


def test_closing_warns_if_no_step_was_seen():
    model = network()
    tracked = track(model, k=2)
    loss_of(model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad)
    with pytest.warns(RuntimeWarning, match=r"no step of a torch.optim.Optimizer .* call advance\(\)"):
        tracked.close()

    # A tracker of the wrong copy of the model.
    other = copy.deepcopy(model)
    tracked = track(model, k=2)
    model.zero_grad()
    plainly(other, [torch.optim.SGD(other.parameters(), lr=0.1)])(1)
    with torch.no_grad():
        model.load_state_dict(other.state_dict())
        model[0].weight.mul_(2)
    with pytest.warns(RuntimeWarning, match="track the model that is trained"):
        tracked.close()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.zero_grad()
        track(model, k=2).close()  # nothing was trained


def test_the_trajectory_names_the_optimizers():
    model = network()
    tracked = track(model, k=2, every=1)
    two_optimizers_of_layers(model)(1)
    assert tracked.trajectory().config["optimizers"] == ["SGD", "AdamW"]
    assert "1 steps of SGD and AdamW" in repr(tracked)


def test_a_due_record_is_taken_after_an_interrupted_step():
    model = network()
    step = plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)

    def interrupted():
        with tracked:
            step(1)
            witness.keep()
            loss_of(model).backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    witness.compare([0, 1])


def test_sharded_weights_are_refused_by_name():
    distributed = pytest.importorskip("torch.distributed", reason="this PyTorch has no torch.distributed")
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        model = network()
        mesh = init_device_mesh("cpu", (1,))
        model[2].weight = nn.Parameter(distribute_tensor(model[2].weight.detach(), mesh))
        with pytest.raises(TypeError, match=r"layer 2 is a DTensor, sharded .*dlnfast\.torch\.RowSharded"):
            track(model)
        track(model, "0").close()
    finally:
        distributed.destroy_process_group()


# ------------------------------------------------------------------------- hooks do not change models


def test_models_are_copied_and_saved_without_hooks():
    model = network()
    tracked = track(model, k=2, every=1)
    step = plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    step(1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    twin = copy.deepcopy(model)
    for other in (again, twin):
        plainly(other, [torch.optim.SGD(other.parameters(), lr=0.1)])(1)
        for p in other.parameters():
            assert not p._backward_hooks
            assert not p._post_accumulate_grad_hooks
    assert tracked.step == 1
    tracked.close()
    for p in model.parameters():
        assert not p._post_accumulate_grad_hooks


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler about profiling
def test_hooks_are_not_traced_by_the_compiler():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = network()
    tracked = track(model, k=3, every=1)
    witness = Witness(model, tracked)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    take_step = torch.compile(lambda: optimizer.step(), backend=backend)
    for number in range(1, 5):
        optimizer.zero_grad()
        (compiled(batch(number)) - 1).square().mean().backward()
        take_step()
        witness.keep()
    tracked.close()
    witness.compare(range(5))
    source = "".join(str(graph.code) for graph in graphs)
    assert len(graphs) >= 2
    assert "svd" not in source
    assert len(graphs) <= 6  # nothing is compiled again step by step
    torch._dynamo.reset()


# ------------------------------------------------------------------------------- the penultimate layer


class Shuffled(nn.Module):
    """Registers its layers in another order than it calls them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 3, dtype=torch.float64)
        self.second = nn.Linear(20, 8, dtype=torch.float64)
        self.first = nn.Linear(12, 20, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class SharedHead(nn.Module):
    """Its head has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.inner = nn.Linear(6, 10)
        self.outer = nn.Linear(10, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.outer(torch.tanh(self.inner(self.embedding(tokens)))))


def test_penultimate_uses_the_order_of_the_forward_pass():
    model = Shuffled()
    assert [m.name for m in track(model, "penultimate").matrices] == ["second"]  # by registration
    model.extra = nn.Linear(2, 2, dtype=torch.float64)  # the last one by registration, and never called
    tracked = track(model, "penultimate", k=3, every=1)
    assert [m.name for m in tracked.matrices] == ["first"]
    start = model.second.weight.detach().clone()
    plainly(model, [torch.optim.SGD(model.parameters(), lr=0.1)])(1)
    tracked.close()
    run = tracked.trajectory()
    assert run.layer_names == ["second"]
    assert run.steps.tolist() == [0, 1]
    for record, weight in enumerate((start, model.second.weight.detach())):
        np.testing.assert_allclose(
            run.singular_values(1)[record],
            torch.linalg.svdvals(weight)[:3].numpy(),
            rtol=tolerance(float, 20),
        )
    moved = torch.linalg.svdvals(model.second.weight.detach() - start)[:3].numpy()
    np.testing.assert_allclose(
        tracked.trajectory("change").singular_values(1)[1], moved, atol=tolerance(float, 20)
    )

    again = track(model, "penultimate", k=3, every=1)
    again.load_state_dict(tracked.state_dict())
    assert [m.name for m in again.matrices] == ["second"]

    model.extra = nn.Identity()
    for of, width in (("output", 8), ("input", 20)):
        ((features, _),) = dln.torch.layer_outputs(
            model, [(batch(), torch.zeros(16, dtype=torch.int64))], "penultimate", of=of
        )
        assert {name: rows.shape[1] for name, rows in features.items()} == {"second": width}


def test_penultimate_features_use_the_order_of_the_forward_pass():
    model = Shuffled()
    model.second, model.first = model.first, model.second  # registered as before
    model.forward = lambda x: model.head(torch.tanh(model.first(torch.tanh(model.second(x)))))
    ((features, _),) = dln.torch.layer_outputs(
        model, [(batch(), torch.zeros(16, dtype=torch.int64))], "penultimate"
    )
    assert {name: rows.shape[1] for name, rows in features.items()} == {"first": 8}


def test_a_head_that_shares_its_embedding_is_the_last_layer():
    model = SharedHead()
    tracked = track(model, "penultimate", k=2, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        optimizer.step()
    tracked.close()
    assert tracked.trajectory().layer_names == ["outer"]


def test_a_single_layer_has_no_penultimate_layer():
    with pytest.raises(ValueError, match="the model has 1 weight matrices"):
        track(nn.Sequential(nn.Linear(3, 3)), "penultimate")
