"""The training loop: resuming, modes, exact batches, stops."""

import copy
import json

import numpy as np
import pytest
import torch

from medmask.config.training import Augment
from medmask.errors import ConfigError, Stopped
from medmask.methods import build_method
from medmask.models.freeze import freeze_stages
from medmask.train.checkpoint import Checkpointer
from medmask.train.distributed import DistContext
from medmask.train.fit import Execution, fit
from medmask.train.optim import lr_at
from medmask.train.validation import is_better, validate
from tests.toy import StopAfter, is_same, run_fit, settings, tiny_network, toy_data

AUGMENT = Augment(flip=0.5, rotate=10, crop_scale=(0.5, 1))
RESUME = {"epochs": 3, "batch_size": 8, "momentum": 0.9, "weight_decay": 1e-3, "schedule": {"kind": "cosine"}}


def history_of(work):
    lines = [json.loads(line) for line in (work / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


@pytest.fixture
def whole(tmp_path):
    """An uninterrupted run of 3 epochs with 3 steps each."""
    data = toy_data(tmp_path / "data", augment=AUGMENT)
    return data, *run_fit(settings(**RESUME), data, tmp_path / "whole")


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adam", "accumulate": 2, "workers": 1}])
@pytest.mark.parametrize("stop_at", [1, 2, 3])  # a step later: inside the first epoch, at its end, inside the second
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(tmp_path, stop_at, changes):
    cfg = settings(**{**RESUME, **changes})
    data = toy_data(tmp_path / "data", augment=AUGMENT)
    weights, state = run_fit(cfg, data, tmp_path / "whole")
    with pytest.raises(Stopped, match=r"stopped after step \d of 9 and saved in .* the same command goes on"):
        run_fit(cfg, data, tmp_path / "parts", stop=StopAfter(stop_at))
    resumed, resumed_state = run_fit(cfg, data, tmp_path / "parts", network=tiny_network(seed=99))
    assert is_same(weights, resumed)
    assert is_same(state.best_weights, resumed_state.best_weights)
    assert (state.best, state.last, state.images_seen) == (
        resumed_state.best, resumed_state.last, resumed_state.images_seen
    )  # fmt: skip
    assert history_of(tmp_path / "whole") == history_of(tmp_path / "parts")


def test_dropout_is_drawn_anew_each_step_and_the_same_after_a_resume(tmp_path):
    def network():
        found = tiny_network()
        found.head = torch.nn.Sequential(torch.nn.Dropout(0.5), found.head)
        return found

    data = toy_data(tmp_path / "data")
    whole, _ = run_fit(settings(), data, tmp_path / "whole", network=network())
    with pytest.raises(Stopped):
        run_fit(settings(), data, tmp_path / "parts", network=network(), stop=StopAfter(2))
    torch.rand(7)  # somebody else draws
    assert is_same(whole, run_fit(settings(), data, tmp_path / "parts", network=network())[0])


@pytest.mark.parametrize("lost", ["momentum", "place", "statistics"])
def test_the_comparison_of_resumed_runs_can_fail(tmp_path, whole, lost):
    data, weights, _ = whole
    with pytest.raises(Stopped):
        run_fit(settings(**RESUME), data, tmp_path / "parts", stop=StopAfter(4))
    checkpoints = Checkpointer(tmp_path / "parts", "k")
    content = checkpoints.load()
    step = content["state"]["step"]
    if lost == "momentum":
        content["optimizers"]["network"]["state"] = {}
    elif lost == "place":
        content["state"]["step"] -= 1
    else:
        content["method"]["network.backbone.1.running_mean"].zero_()
    checkpoints.save(step, content)
    assert not is_same(weights, run_fit(settings(**RESUME), data, tmp_path / "parts")[0])


def test_saving_by_the_clock_changes_nothing(tmp_path, whole, monkeypatch):
    data, weights, _ = whole
    saved = []
    monkeypatch.setattr(Checkpointer, "save", lambda self, step, state: saved.append(step))
    cfg = settings(**RESUME)
    method = build_method("supervised", tiny_network(), cfg)
    work = tmp_path / "often"
    fit(cfg, method, data, Execution(DistContext(), Checkpointer(work, "k"), work, checkpoint_min=0))
    assert is_same(weights, method.export())
    assert saved == [2, 3, 5, 6, 8, 9]  # asked in a step, read in the next; and the ends of epochs


def test_seed_decides(tmp_path, whole):
    data, weights, _ = whole
    assert is_same(weights, run_fit(settings(**RESUME), data, tmp_path / "again")[0])
    assert not is_same(weights, run_fit(settings(**RESUME, seed=1), data, tmp_path / "other")[0])


def test_one_sgd_step_by_hand(tmp_path):
    data = toy_data(tmp_path, n=17, n_val=9)  # 8 training images: one step an epoch
    cfg = settings(epochs=1, momentum=0, lr=0.5, order="file")
    network = tiny_network()
    twin = copy.deepcopy(network).train()
    weights, _ = run_fit(cfg, data, tmp_path / "work", network=network)
    images, labels = data.reader.batch(np.arange(8)), torch.from_numpy(data.train.labels)
    torch.nn.functional.cross_entropy(twin(images), labels).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach() - 0.5 * parameter.grad)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    data = toy_data(tmp_path)
    results = [
        run_fit(settings(batch_size=7, accumulate=k), data, tmp_path / str(k), network=tiny_network(norm=False))[0]
        for k in (1, 3)  # parts of 2, 2 and 3 images
    ]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped(tmp_path):
    data = toy_data(tmp_path, n=17, n_val=9)
    network = tiny_network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    cfg = settings(epochs=1, momentum=0, lr=1.0, clip_norm=0.01)
    after, _ = run_fit(cfg, data, tmp_path / "work", network=network)
    moved = torch.cat([(after[name] - value).flatten() for name, value in before.items()])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("train_mode", "updates"), [("always", 6), ("first_step", 2)])
def test_batch_statistics_by_train_mode(tmp_path, train_mode, updates):
    weights, _ = run_fit(settings(train_mode=train_mode), toy_data(tmp_path), tmp_path / "work")
    assert int(weights["backbone.1.num_batches_tracked"]) == updates  # 2 epochs of 3 steps


def test_a_frozen_backbone_stays_as_it_is(tmp_path):
    network = tiny_network()
    freeze_stages(network.backbone, "all")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    after, _ = run_fit(settings(), toy_data(tmp_path), tmp_path / "work", network=network)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing is left to train"):
        run_fit(settings(), toy_data(tmp_path), tmp_path / "work", network=tiny_network().requires_grad_(False))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ConfigError, match=r"lr: the loss at step \d is not finite, at a learning rate of 1e\+30"):
        run_fit(settings(lr=1e30), toy_data(tmp_path), tmp_path / "work", network=tiny_network(norm=False))
    for path in (tmp_path / "work").glob("checkpoint-*.pt"):
        assert all(v.isfinite().all() for v in torch.load(path, weights_only=True)["method"].values())


def test_bf16_is_near_fp32(tmp_path):
    data = toy_data(tmp_path)
    (full, _), (half, _) = (run_fit(settings(precision=p), data, tmp_path / p) for p in ("fp32", "bf16"))
    assert not is_same(full, half)
    assert half["head.weight"].dtype == torch.float32
    torch.testing.assert_close(full["head.weight"], half["head.weight"], rtol=0.1, atol=0.05)


def test_history_and_state(tmp_path, whole):
    _, _, state = whole
    lines = history_of(tmp_path / "whole")
    steps = [line for line in lines if "loss/total" in line]
    assert [(line["step"], line["epoch"]) for line in steps] == [(s, (s - 1) // 3 + 1) for s in range(1, 10)]
    assert steps[4]["lr"] == lr_at(settings(**RESUME), 1)
    ends = [line for line in lines if "val/loss" in line]
    assert [line["step"] for line in ends] == [3, 6, 9]
    assert ends[-1]["val/accuracy"] == state.last["accuracy"]
    assert (state.step, state.images_seen) == (9, 63)
    assert state.best == max((dict(e) for e in [state.best, state.last]), key=lambda e: e["balanced_accuracy"])


def test_validation_numbers_by_hand(tmp_path):
    data = toy_data(tmp_path, n=30, n_val=9)  # 9 validation images of the labels 1 0 1 0 1 0 1 0 1

    class Fixed(torch.nn.Module):
        def validation_step(self, batch):
            wrong = torch.tensor([4.0, 0, 0, 0, 0, 0, 0, 0, 0])
            predicted = batch.labels.clone()
            predicted[0] = 0
            return {"loss": wrong, "predicted": predicted}

    numbers = validate(Fixed(), data, DistContext())
    assert numbers == pytest.approx({"loss": 4 / 9, "accuracy": 8 / 9, "balanced_accuracy": (1 + 4 / 5) / 2})


def test_the_first_of_equal_epochs_is_the_best():
    a, b = {"accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.5, "loss": 1.0}
    assert not is_better(b, a, "accuracy")
    assert is_better(b, a, "loss")
    assert not is_better(a, b, "loss")
    assert is_better({"accuracy": 0.6, "loss": 2.0}, a, "accuracy")
    assert is_better(a, {}, "accuracy")
    assert is_better({}, {}, "accuracy")  # nothing to validate on: the last epoch
    assert not is_better({"loss": float("nan")}, {"loss": 1.0}, "loss")
    assert is_better({"loss": 1.0}, {"loss": float("nan")}, "loss")
    assert is_better({"loss": 1.0}, {"loss": 2.0}, "balanced_accuracy")  # no classifier
