"""What does the training loop cost above the same steps written out in plain PyTorch?"""

import numpy as np
import torch
from torch.nn import functional

from medmask.config.finetuning import SupervisedFinetuning
from medmask.data.images import ImageReader
from medmask.methods import build_method
from medmask.models.backbones import Classifier, build_backbone
from medmask.models.heads import build_head, head_settings
from medmask.train.checkpoint import Checkpointer
from medmask.train.distributed import DistContext
from medmask.train.fit import Execution, fit
from medmask.train.loader import Rows, TrainingData

N, BATCH = 4096, 128
CFG = SupervisedFinetuning(
    method="supervised", backbone="small_cnn", head={"kind": "mlp_bn"}, image={"size": 28},
    epochs=1, batch_size=BATCH, lr=0.01,
)  # fmt: skip


def network():
    torch.manual_seed(0)
    return Classifier(build_backbone("small_cnn", 3), build_head(head_settings(CFG.head), width=512, n_classes=2))


def test_training_loop(compare, tmp_path):
    """An epoch of the loop, which takes channels_last, reading the pack, above a plain loop over tensors in memory."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (N, 28, 28, 1), dtype=np.uint8)
    labels = rng.integers(0, 2, N)
    images, index = tmp_path / "images.npy", tmp_path / "index.npy"
    np.save(images, pixels.ravel())
    np.save(index, np.stack([np.arange(N) * 784, *(np.full(N, side) for side in (28, 28, 1))], axis=1))
    rows = Rows(np.arange(N), labels, labels)
    nothing = Rows(*(np.empty(0, dtype=np.int64),) * 3)
    data = TrainingData(rows, nothing, ImageReader(images, index, CFG.image, CFG.augment, 0))

    def ours():
        work = tmp_path / "work"
        checkpointer = Checkpointer(work, "key")
        fit(CFG, build_method("supervised", network(), CFG), data, Execution(DistContext(), checkpointer, work))
        checkpointer.clear()

    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float().div(255).sub(0.5).div(0.5)
    targets = torch.from_numpy(labels)

    def floor():
        net = network().train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        for part in torch.randperm(N).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(net(tensors[part]), targets[part]).backward()
            optimizer.step()

    question = "an epoch of `fit` (SmallCNN, 4,096 images, batch 128) above a bare loop, default memory format"
    ratio = compare(question, ours, floor, "an epoch")
    assert ratio < 1.25
