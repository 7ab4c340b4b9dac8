"""Learning rates against published lists."""

import pytest
import torch

from medmask.train.optim import build_optimizers, lr_at
from tests.toy import settings


def rates(n: int, **changes) -> list[float]:
    cfg = settings(**changes)
    return [lr_at(cfg, epoch) for epoch in range(n)]


def test_warmup_then_step():
    warmup = {"epochs": 7, "factor": 0.01}
    found = rates(10, epochs=10, lr=1e-3, warmup=warmup, schedule={"kind": "step", "every": 30})
    expected = [1e-5, 1.5143e-4, 2.9286e-4, 4.3429e-4, 5.7571e-4, 7.1714e-4, 8.5857e-4, 1e-3, 1e-3, 1e-3]
    assert found == pytest.approx(expected, rel=1e-4)


def test_step():
    found = rates(200, epochs=200, lr=4e-3, schedule={"kind": "step", "every": 50, "gamma": 0.5})
    assert [found[e] for e in (0, 49, 50, 100, 150)] == pytest.approx([0.004, 0.004, 0.002, 0.001, 0.0005])
    found = rates(50, epochs=50, lr=0.01, schedule={"kind": "step", "every": 25, "gamma": 0.5})
    assert found == pytest.approx([0.01] * 25 + [0.005] * 25)


def test_cosine_with_floor():
    found = rates(30, epochs=30, lr=5e-4, schedule={"kind": "cosine", "floor": 0.2})
    assert [found[e] for e in (0, 15, 29)] == pytest.approx([5e-4, 3e-4, 1.011e-4], rel=1e-4)
    found = rates(90, epochs=90, lr=0.01, schedule={"kind": "cosine"})
    assert [found[e] for e in (0, 45, 89)] == pytest.approx([0.01, 0.005, 3.05e-6], rel=2e-3)


def test_cosine_starts_after_warmup():
    found = rates(6, epochs=6, lr=1.0, warmup={"epochs": 2, "factor": 0.5}, schedule={"kind": "cosine"})
    assert found[:4] == pytest.approx([0.5, 0.75, 1.0, (1 + 0.5**0.5) / 2])


def test_exponential_and_constant():
    found = rates(5, epochs=5, lr=1e-4, schedule={"kind": "exponential", "gamma": 0.5})
    assert found == pytest.approx([1e-4, 5e-5, 2.5e-5, 1.25e-5, 6.25e-6])
    assert rates(3, epochs=3, lr=0.1) == [0.1] * 3


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_one_optimizer_a_group(name, kind):
    groups = {"a": [torch.nn.Parameter(torch.ones(1))], "b": [torch.nn.Parameter(torch.ones(1))], "none": []}
    found = build_optimizers(settings(optimizer=name, weight_decay=0.1), groups)
    assert {key: type(value).__name__ for key, value in found.items()} == {"a": kind, "b": kind}
    assert found["a"].param_groups[0]["weight_decay"] == 0.1


def test_sgd_takes_momentum_and_nesterov():
    group = {"a": [torch.nn.Parameter(torch.ones(1))]}
    found = build_optimizers(settings(momentum=0.5, nesterov=True), group)["a"].param_groups[0]
    assert (found["momentum"], found["nesterov"]) == (0.5, True)
