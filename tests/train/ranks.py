"""What each of two or four processes runs for test_distributed.py: `python -m tests.train.ranks FOLDER`."""

import contextlib
import copy
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad

from medmask.errors import Stopped
from medmask.methods import METHODS
from medmask.models.freeze import freeze_stages
from medmask.train.batchnorm import convert_batchnorm
from medmask.train.distributed import DistContext, Verdict, distributed
from tests.toy import StopAfter, run_fit, settings, tiny_network, toy_data

PUBLISHED = {"mode": "as_published", "ranks": 2, "batch_size": 8, "meta": {"size": 3}}
OWN = {"batch_size": 4, "ranks": 2, "sync_bn": False}
STOPPED = "refurbish, stopped"
ALONE = "reweight, each rank alone"
ONE_STEP = "published reweight, one step"
FOUR = ("reweight, whole batches", "refurbish, whole batches", "proposal, in turns")  # by four ranks too
TRAININGS = {
    **{f"method {name}": {"method": name} for name in METHODS},
    "reweight, sigmoid": {"method": "reweight", "weights": "sigmoid", "rescale": "none"},
    "reweight, last layer": {"method": "reweight", "gradient": "last_layer"},
    "refurbish, hard": {"method": "refurbish", "targets": "hard", "reduction": "sum", "lr": 0.005},
    "proposal, soft": {"method": "proposal", "targets": "soft", "rescale": "lr", "augment": {"flip": 0.5}},
    **{f"{name}, whole batches": {"method": name, "drop_last": True} for name in ("reweight", "refurbish")},
    "proposal, in turns": {"method": "proposal", "alternate": True, "drop_last": True},
    "confident, reweight": {"method": "confident", "errors": "reweight"},
    STOPPED: {"method": "refurbish"},
    **{f"published {name}": {"method": name, **PUBLISHED} for name in ("reweight", "proposal")},
    ONE_STEP: {
        "method": "reweight",
        **PUBLISHED,
        "weights": "clamp",
        "batch_size": 20,
        "epochs": 1,
        "clip_norm": None,
        "seed": 1,
    },
    ALONE: {"method": "reweight", **OWN, "drop_last": True, "meta": {"size": 1, "scope": "rank"}},
    "parts": {"accumulate": 2},
    "frozen": {},
    "own statistics": {"sync_bn": False, "ranks": 2, "batch_size": 8, "drop_last": True},
}


def norm_network() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    return nn.Sequential(layers, nn.BatchNorm1d(2)).double().train()


def norm_images() -> torch.Tensor:
    return torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double() + 100


def norm_loss(outputs: torch.Tensor) -> torch.Tensor:
    return (outputs**3).sum()


def check_norm(ctx: DistContext) -> dict[str, torch.Tensor]:
    """Gradients, running statistics and a forward-mode product of 5 images, 3 on rank 0 and 2 on rank 1."""
    network = norm_network()
    convert_batchnorm(network, ctx.device)
    images = norm_images()[slice(0, 3) if ctx.rank == 0 else slice(3, 5)]
    norm_loss(network(images)).backward()
    result = {name: p.grad * ctx.world for name, p in network.named_parameters()}
    result = {name: ctx.mean(value) for name, value in result.items()}
    result |= {name: buffer.clone() for name, buffer in network.named_buffers()}
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(images, torch.ones_like(images).cumsum(0) + 3 * ctx.rank)
        tangent = forward_ad.unpack_dual(norm_loss(network(dual))).tangent
    return {**result, "jvp": ctx.mean(tangent) * ctx.world}


def check_context(ctx: DistContext) -> None:
    ok, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    assert ctx.agree(ok, ctx.rank == 1, False) == Verdict()  # about no step
    assert ctx.agree(bad if ctx.rank == 1 else ok, False, ctx.rank == 0) == Verdict(stop=True)
    assert ctx.answer() == Verdict(not_finite=True, save=True)
    own = np.arange(5.0)[ctx.share(5)][:, None]
    assert len(own) == (2 if ctx.rank == 0 else 3)
    assert ctx.gather(own, 5).tolist() == [[0], [1], [2], [3], [4]]
    assert float(ctx.mean(torch.tensor(float(ctx.rank)))) == 0.5


def train_all(folder: Path, ctx: DistContext) -> dict[str, dict[str, torch.Tensor]]:
    names = FOUR if ctx.world == 4 else TRAININGS
    data = toy_data(folder / f"data-{ctx.world}-{ctx.rank}", flip_every=3)
    results = {}
    for name in names:
        network = copy.deepcopy(tiny_network())
        if name == "frozen":
            freeze_stages(network.backbone, "all")
        work = folder / f"work-{ctx.world}" / name
        cfg = settings(**{"batch_size": 9, **TRAININGS[name]})  # 21 images: batches of 9, 9 and 3, shared unequally
        if ctx.world == 1 and not cfg.sync_bn:
            continue
        if name == STOPPED:
            with contextlib.suppress(Stopped):
                run_fit(cfg, data, work, network=copy.deepcopy(network), ctx=ctx, stop=StopAfter(1))
            ctx.barrier()  # until the main rank has saved
            if ctx.world == 2 and ctx.is_main:
                shutil.copytree(work, folder / "moved")  # for one process to go on with
        results[name] = run_fit(cfg, data, work, network=network, ctx=ctx, with_memory=True)[0]
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed(wants_gpu=False) as context:
        target = Path(sys.argv[1])
        found = train_all(target, context)
        if context.world == 2:
            check_context(context)
            found["norm"] = check_norm(context)
        torch.save(found, target / f"rank{context.rank}.pt")
