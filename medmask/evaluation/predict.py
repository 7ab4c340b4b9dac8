"""Class probabilities of a network for a list of images."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from medmask.config.base import Needs
from medmask.evaluation.metrics import Array
from medmask.models.cores import use_cores


def pick_device(needs: Needs) -> torch.device:
    """The first GPU if one is asked for and there is one, else as many cores as are asked for."""
    use_cores(needs.cpus)
    return torch.device("cuda" if needs.gpu and torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def predict_probs(network: nn.Module, batches: Iterable[torch.Tensor], device: torch.device) -> Array:
    """Softmax of the network's logits, in the order of the batches.

    Parameters
    ----------
    network : gives logits (B, K); put in eval mode here.
    batches : images (B, C, H, W), float32.

    Returns
    -------
    ndarray, (N, K), float64. Rows sum to one; NaN where the network gave no finite logits.
    """
    network = network.to(device).eval()
    parts = [network(images.to(device)).double().softmax(dim=1).cpu().numpy() for images in batches]
    return np.concatenate(parts)
