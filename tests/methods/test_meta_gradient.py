"""The meta-gradient against an unrolled step of torch's own optimizers; as a script, what each of two ranks runs."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn, optim
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from medmask.errors import ConfigError
from medmask.methods.meta_gradient import (
    agreement_of,
    clean_direction,
    copied_buffers,
    forward_with_last_layer_tangents,
    forward_with_tangents,
)
from medmask.train.batchnorm import convert_batchnorm
from medmask.train.distributed import distributed
from tests.toy import is_same, run_ranks

N, CLEAN, CLASSES = 6, 3, 4


class Block(nn.Module):
    """A sum and a ReLU in place, as in a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, images):
        out = self.norm(self.conv(images))
        out += images
        return self.relu(out)


def make_network() -> nn.Module:
    """No bias before a batch norm: its gradient is zero, where the square root of torch's Adam has no derivative."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 4, 3, bias=False), nn.Linear(16, 5, bias=False)
    trunk = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), Block(), nn.MaxPool2d(2), nn.Flatten())
    network = nn.Sequential(trunk, second, nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    for values in [*network.parameters(), *(m.running_var for m in network.modules() if hasattr(m, "running_var"))]:
        values.data = values.data + 0.3 * torch.rand(values.shape, dtype=torch.float64)
    return network


def make_batches():
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(N + CLEAN, 2, 6, 6, generator=rng, dtype=torch.float64)
    labels = torch.randint(CLASSES, (N + CLEAN,), generator=rng)
    return images[:N], labels[:N], images[N:], labels[N:]


def losses_on(labels):
    return lambda logits: functional.cross_entropy(logits, labels, reduction="none")


def agreement_by_ours(network, optimizer, images, labels, clean_images, clean_labels, forward=None):
    if forward:
        return agreement_of(losses_on(labels), *forward(network, optimizer, images, clean_images, clean_labels))
    direction = clean_direction(network, optimizer, clean_images, clean_labels)
    return agreement_of(losses_on(labels), *forward_with_tangents(network, images, direction))


def agreement_unrolled(network, optimizer, images, labels, clean_images, clean_labels):
    """Differentiate twice, through the optimizer's step, as the published code does."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    losses = losses_on(labels)(functional_call(network, copied_buffers(network), images))
    weights = torch.zeros(len(images), dtype=losses.dtype, requires_grad=True)
    gradients = torch.autograd.grad((weights * losses).sum(), list(trained.values()), create_graph=True)
    step = step_by_the_book if type(optimizer) is SGD else step_of_torch
    moved = {
        name: step(parameter, gradient, optimizer.state.get(parameter, {}), optimizer.param_groups[0])
        for (name, parameter), gradient in zip(trained.items(), gradients, strict=True)
    }
    logits = functional_call(network, {**moved, **copied_buffers(network)}, clean_images)
    return -torch.autograd.grad(functional.cross_entropy(logits, clean_labels), weights)[0]


def step_by_the_book(parameter, gradient, state, group):
    """As torch.optim.SGD documents it; its `differentiable` cuts the graph where the buffer begins."""
    momentum = group["momentum"]
    gradient = gradient + group["weight_decay"] * parameter
    if momentum:
        buffer = gradient
        if "momentum_buffer" in state:
            buffer = momentum * state["momentum_buffer"] + (1 - group["dampening"]) * gradient
        gradient = gradient + momentum * buffer if group["nesterov"] else buffer
    return parameter - group["lr"] * gradient


def step_of_torch(parameter, gradient, state, group):
    """A step of torch's Adam or AdamW that autograd can follow."""
    zeros = torch.zeros_like(parameter.detach())
    state = (
        copy.deepcopy(state) if state else {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.tensor(0.0)}
    )
    moved = parameter.clone()
    moved.grad = gradient
    kind = ADAMW if group["decoupled_weight_decay"] else ADAM
    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
    optimizer = kind([moved], **options, differentiable=True)
    optimizer.state[moved].update({**state, "step": state["step"].double()})
    optimizer.step()
    return moved


def take_steps(network, optimizer, n=2):
    for step in range(n):
        images = torch.randn(N, 2, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()


SGD, ADAM, ADAMW = optim.SGD, optim.Adam, optim.AdamW
OPTIMIZERS = {
    "plain": (SGD, {}, 0),
    "weight decay": (SGD, {"weight_decay": 0.3}, 0),
    "momentum, first step": (SGD, {"momentum": 0.9, "dampening": 0.4}, 0),
    "momentum": (SGD, {"momentum": 0.9, "weight_decay": 0.3}, 2),
    "dampening": (SGD, {"momentum": 0.9, "weight_decay": 0.3, "dampening": 0.4}, 2),
    "nesterov, first step": (SGD, {"momentum": 0.9, "weight_decay": 0.3, "nesterov": True}, 0),
    "nesterov": (SGD, {"momentum": 0.9, "weight_decay": 0.3, "nesterov": True}, 2),
    "adam, first step": (ADAM, {"weight_decay": 0.3, "eps": 1e-3}, 0),
    "adam": (ADAM, {"weight_decay": 0.3}, 2),
    "adamw": (ADAMW, {"weight_decay": 0.3, "betas": (0.8, 0.95)}, 2),
}


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_an_unrolled_step(name, is_training):
    kind, options, n_before = OPTIMIZERS[name]
    network = make_network().train(is_training)
    optimizer = kind(network.parameters(), lr=0.1, **options)
    take_steps(network, optimizer, n_before)
    expected = agreement_unrolled(network, optimizer, *make_batches())
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(agreement_by_ours(network, optimizer, *make_batches()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [("0.0.",), ("0.1.weight",), ("0.1.bias", "2."), ("0.", "1.", "2.")])
def test_frozen_parameters_do_not_move(frozen):
    network = make_network()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    optimizer = SGD(network.parameters(), lr=0.1, weight_decay=0.3)
    expected = agreement_unrolled(network, optimizer, *make_batches())
    torch.testing.assert_close(agreement_by_ours(network, optimizer, *make_batches()), expected, rtol=1e-10, atol=1e-10)


def test_only_what_the_optimizer_trains_moves():
    network = make_network()
    images, labels, *clean = make_batches()
    direction = clean_direction(network, SGD(network[4].parameters(), lr=0.1), *clean)
    assert list(direction) == ["4.weight", "4.bias"]
    logits, tangents = forward_with_tangents(network, images, {})
    assert agreement_of(losses_on(labels), logits, tangents).tolist() == [0] * N


def test_adamw_without_a_past_divides_by_eps():
    network = make_network()
    batches = make_batches()
    plain = agreement_by_ours(network, SGD(network.parameters(), lr=1), *batches)
    found = agreement_by_ours(network, ADAMW(network.parameters(), lr=0.1, eps=1e-3, weight_decay=0), *batches)
    torch.testing.assert_close(found, plain * 0.1 / 1e-3, rtol=1e-10, atol=1e-10)


def test_two_classes_by_hand():
    """Fact 1: W = 0, x = 1, clean label 0, learning rate 0.1."""
    network = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(network.weight)
    batches = torch.ones(2, 1), torch.tensor([0, 1]), torch.ones(1, 1), torch.tensor([0])
    for forward in (None, forward_with_last_layer_tangents):
        found = agreement_by_ours(network, SGD(network.parameters(), lr=0.1), *batches, forward=forward)
        torch.testing.assert_close(found, torch.tensor([0.05, -0.05]))
        assert not found.requires_grad


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_the_pass_is_the_ordinary_one(is_training):
    """The same logits and gradients to the last bit, running statistics touched once and only by the real pass."""
    network = make_network().train(is_training)
    twin = copy.deepcopy(network)
    images, labels, *clean = make_batches()
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(network.state_dict())
    direction = clean_direction(network, optimizer, *clean)
    assert is_same(network.state_dict(), before)
    assert all(p.grad is None for p in network.parameters())
    logits, tangents = forward_with_tangents(network, images, direction)
    assert not tangents.requires_grad
    functional.cross_entropy(logits, labels).backward()
    functional.cross_entropy(twin(images), labels).backward()
    assert is_same(network.state_dict(), twin.state_dict())
    for parameter, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_soft_targets():
    network = make_network()
    optimizer = SGD(network.parameters(), lr=0.1)
    images, labels, *clean = make_batches()
    targets = functional.one_hot(labels, CLASSES).double()
    logits, tangents = forward_with_tangents(network, images, clean_direction(network, optimizer, *clean))
    hard = agreement_of(losses_on(labels), logits, tangents)
    soft = agreement_of(lambda z: -(targets * z.log_softmax(1)).sum(1), logits, tangents)
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize(("kind", "options", "n_before"), [(SGD, {"momentum": 0.9}, 2), (ADAM, {}, 2)])
def test_last_layer_is_the_exact_one_with_the_rest_frozen(kind, options, n_before):
    network = make_network()
    optimizer = kind(network.parameters(), lr=0.1, weight_decay=0.3, **options)
    take_steps(network, optimizer, n_before)
    before = copy.deepcopy(network.state_dict())
    found = agreement_by_ours(network, optimizer, *make_batches(), forward=forward_with_last_layer_tangents)
    assert int(network[2].num_batches_tracked) == int(before["2.num_batches_tracked"]) + 1
    network.load_state_dict(before)
    network[:4].requires_grad_(False)
    expected = agreement_by_ours(network, optimizer, *make_batches())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_last_layer_by_hand():
    """lr <p - t, mean of q - s> (<f, h> + 1) for features f and h, clean probabilities q and clean targets s."""
    network = nn.Linear(3, 2)
    features, clean = torch.randn(4, 3), torch.randn(1, 3)
    labels, clean_labels = torch.tensor([0, 1, 1, 0]), torch.tensor([1])
    batches = features, labels, clean, clean_labels
    optimizer = SGD(network.parameters(), lr=0.1)
    found = agreement_by_ours(network, optimizer, *batches, forward=forward_with_last_layer_tangents)
    residuals = network(features).softmax(1) - functional.one_hot(labels, 2)
    clean_residual = network(clean).softmax(1) - functional.one_hot(clean_labels, 2)
    expected = 0.1 * (residuals * clean_residual).sum(1) * ((features * clean).sum(1) + 1)
    torch.testing.assert_close(found, expected.detach())


class Views(nn.Module):
    """In place on views whose base is used afterwards."""

    def forward(self, features):
        out = 2 * features
        out += features
        out[..., :2].mul_(3)
        functional.leaky_relu(out[..., 1:3], inplace=True)
        return out


@pytest.mark.parametrize("name", ["attention", "views"])
def test_other_layers(name):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    inner = nn.Sequential(nn.Flatten(2), nn.Linear(36, 8), encoder if name == "attention" else Views())
    network = nn.Sequential(inner, nn.Flatten(), nn.Linear(16, CLASSES)).double()
    optimizer = SGD(network.parameters(), lr=0.1)
    with sdpa_kernel(SDPBackend.MATH):
        expected = agreement_unrolled(network, optimizer, *make_batches())
    torch.testing.assert_close(agreement_by_ours(network, optimizer, *make_batches()), expected, rtol=1e-10, atol=1e-10)


def test_bf16_and_channels_last():
    network = make_network().float().to(memory_format=torch.channels_last)
    optimizer = SGD(network.parameters(), lr=0.1)
    images, labels, clean_images, clean_labels = make_batches()
    pack = {"dtype": torch.float32, "memory_format": torch.channels_last}
    batches = images.to(**pack), labels, clean_images.to(**pack), clean_labels
    found = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for forward in (None, forward_with_last_layer_tangents):
                found[enabled, forward] = agreement_by_ours(network, optimizer, *batches, forward=forward)
    assert {values.dtype for values in found.values()} == {torch.float32}
    halves = torch.ones(2, N, CLASSES, dtype=torch.bfloat16)
    assert agreement_of(losses_on(labels), *halves).dtype == torch.float32
    for forward in (None, forward_with_last_layer_tangents):
        error = found[True, forward] - found[False, forward]
        assert error.norm() < 0.05 * found[False, forward].norm()


@pytest.mark.parametrize("is_exact", [True, False])
def test_bf16_leaves_all_gradients(is_exact):
    network = make_network().float()
    twin = copy.deepcopy(network)
    optimizer = SGD(network.parameters(), lr=0.1)
    images, labels, clean_images, clean_labels = make_batches()
    clean = clean_images.float(), clean_labels
    with torch.autocast("cpu", torch.bfloat16):
        if is_exact:
            logits, _ = forward_with_tangents(network, images.float(), clean_direction(network, optimizer, *clean))
        else:
            logits, _ = forward_with_last_layer_tangents(network, optimizer, images.float(), *clean)
        functional.cross_entropy(logits, labels).backward()
        functional.cross_entropy(twin(images.float()), labels).backward()
    for parameter, other in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize(
    ("make", "name"),
    [(optim.Adagrad, "Adagrad"), (lambda p, lr: SGD(p, lr, maximize=True), "SGD")],
)
def test_a_step_without_known_derivative_is_refused(make, name):
    network = make_network()
    with pytest.raises(ConfigError, match=f"optimizer: the meta-gradient needs .* got {name}"):
        clean_direction(network, make(network.parameters(), lr=0.1), *make_batches()[2:])


def test_one_trusted_image_is_too_few_for_a_batch_norm_of_features():
    network = make_network()
    images, labels, clean_images, clean_labels = make_batches()
    batches = images, labels, clean_images[:1], clean_labels[:1]
    for forward in (None, forward_with_last_layer_tangents):
        with pytest.raises(ConfigError, match="batch norm has no statistics of one trusted image, take two"):
            agreement_by_ours(network, SGD(network.parameters(), lr=0.1), *batches, forward=forward)


def test_a_network_without_a_linear_layer_has_no_last_one():
    network = nn.Sequential(nn.Conv2d(2, CLASSES, 6), nn.Flatten())
    with pytest.raises(ConfigError, match="no linear layer that is trained"):
        agreement_by_ours(
            network, SGD(network.parameters(), lr=0.1), *make_batches(), forward=forward_with_last_layer_tangents
        )


class Square(torch.autograd.Function):
    @staticmethod
    def forward(values):
        return values**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class Odd(nn.Linear):
    def __init__(self, how: str) -> None:
        super().__init__(2, 2)
        self.how = how

    def forward(self, images):
        out = super().forward(images)
        if self.how == "function":
            return Square.apply(out)
        if self.how == "type":
            out = out.bfloat16()
            out += images
            return out
        whole = torch.zeros_like(images)
        if self.how == "item":
            whole[:, 0] = out[:, 0]
            return whole
        return whole.add_(out)


@pytest.mark.parametrize("how", ["function", "item", "add_"])
def test_a_tangent_is_never_lost_in_silence(how):
    network = Odd(how)
    direction = {name: torch.ones_like(p) for name, p in network.named_parameters()}
    with pytest.raises(ConfigError, match="backbone: the meta-gradient cannot follow a layer"):
        forward_with_tangents(network, torch.ones(3, 2), direction)


def test_a_sum_in_place_keeps_its_type():
    network = Odd("type")
    outputs = forward_with_tangents(network, torch.ones(3, 2), {"weight": torch.ones(2, 2)})
    assert [output.dtype for output in outputs] == [torch.bfloat16] * 2


def rank_batches(rank: int | None):
    """Ranks share the batch unequally, and hold the same clean images."""
    images, labels, *clean = make_batches()
    own = slice(None) if rank is None else slice(0, 4) if rank == 0 else slice(4, N)
    return images[own], labels[own], *clean


def direction_and_agreement(network, rank=None):
    optimizer = SGD(network.parameters(), lr=0.1, weight_decay=0.3, momentum=0.9)
    images, labels, *clean = rank_batches(rank)
    direction = clean_direction(network, optimizer, *clean)
    logits, tangents = forward_with_tangents(network, images, direction)
    agreement = agreement_of(losses_on(labels), logits, tangents)
    (agreement.clamp(min=0) * losses_on(labels)(logits)).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters()}
    return {**direction, **gradients, **copied_buffers(network), "agreement": agreement}


def test_two_ranks_find_what_one_process_finds(tmp_path):
    """Each rank has the clean gradient of one process, not a multiple; a sum of weighted losses gives its gradients."""
    ranks = run_ranks("tests.methods.test_meta_gradient", tmp_path)
    expected = direction_and_agreement(make_network().train())
    for key, value in expected.items():
        found = [rank[key] for rank in ranks]
        if key == "agreement":
            found = [torch.cat(found)]
        elif key.startswith("gradient"):
            found = [sum(found)]
        for one in found:
            torch.testing.assert_close(one, value, rtol=1e-10, atol=1e-10, msg=key)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed(wants_gpu=False) as context:
        model = make_network().train()
        convert_batchnorm(model, context.device)
        torch.save(direction_and_agreement(model, context.rank), Path(sys.argv[1]) / f"rank{context.rank}.pt")
