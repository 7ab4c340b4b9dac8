"""Generalised cross-entropy and early-learning regularisation by hand."""

import pytest
import torch
from torch.nn import functional

from medmask.methods import build_method
from medmask.methods.base import Clock
from medmask.methods.elr import early_learning, renewed
from medmask.methods.gce import generalised_cross_entropy
from medmask.train.distributed import DistContext
from medmask.train.optim import build_optimizers
from tests.methods.test_meta_learning import batch_of
from tests.toy import settings, tiny_network, toy_data

PROBS = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]])
LABELS = torch.tensor([1, 0])


def test_generalised_cross_entropy_by_hand():
    found = generalised_cross_entropy(PROBS.log(), LABELS, 0.7)
    assert found.tolist() == pytest.approx([(1 - 0.3**0.7) / 0.7, (1 - 0.9**0.7) / 0.7])
    assert generalised_cross_entropy(PROBS.log(), LABELS, 1.0).tolist() == pytest.approx([0.7, 0.1])
    near = generalised_cross_entropy(PROBS.log(), LABELS, 1e-4)
    assert near.tolist() == pytest.approx(functional.nll_loss(PROBS.log(), LABELS, reduction="none").tolist(), rel=1e-3)


def test_gradient_of_generalised_cross_entropy_is_finite_where_p_is_0():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    generalised_cross_entropy(logits, torch.tensor([1]), 0.7).sum().backward()
    assert logits.grad.isfinite().all()


def test_running_predictions_by_hand():
    first = renewed(torch.zeros(2, 3), PROBS, 0.7)
    torch.testing.assert_close(first, 0.3 * PROBS)
    torch.testing.assert_close(renewed(first, PROBS, 0.7), 0.51 * PROBS)
    assert early_learning(torch.eye(3)[:2], PROBS).tolist() == pytest.approx(torch.tensor([0.8, 0.95]).log().tolist())


def test_elr_remembers_by_image(tmp_path):
    data = toy_data(tmp_path)
    cfg = settings(method="elr")
    method = build_method("elr", tiny_network(norm=False), cfg)
    method.setup(data, DistContext(), build_optimizers(cfg, method.param_groups()))
    batch, clock = batch_of(data, [4, 2, 9]), Clock(0, 0, 0, 0.0)
    probs = method.predict(batch.images)
    for step in (1, 2):  # the same weights twice
        share = 1 - 0.7**step
        loss = method(batch, clock).loss
        method.after_step(clock, DistContext())
        torch.testing.assert_close(method.memory()["targets"][[4, 2, 9]], share * probs.detach())
        regulariser = (1 - share * (probs.detach() * probs).sum(1)).log().mean()
        torch.testing.assert_close(loss, -probs[range(3), batch.labels].log().mean() + 3 * regulariser)
    assert method.memory()["targets"][[0, 1, 3]].abs().max() == 0
