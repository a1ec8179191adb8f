"""The networks of the papers' nonlinear figures and their neighbours, small enough to train here.

Every model maps a batch to logits (B, classes) and names two of its matrices: `penultimate`, the last hidden one, which
P2 swaps, and `last`, the output layer. `features` gives what the output layer gets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressible.runtime.checks import expect, unknown

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "identity": nn.Identity}
VGG = {
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "vgg16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
}


class Network(nn.Module):
    """A module that maps a batch to logits (B, classes)."""

    penultimate: str  # dotted name of the last hidden matrix
    last: str  # and of the output layer

    def __init__(self, body: nn.Module, penultimate: str, last: str) -> None:
        super().__init__()
        self.body, self.penultimate, self.last = body, f"body.{penultimate}", f"body.{last}"

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        found: Any = self.body(inputs)
        return found if isinstance(found, Tensor) else found.logits


def seeded(seed: int, make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Return make(*args, **kwargs), its initial weights drawn on the CPU under a seed; other draws stay as they are."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make(*args, **kwargs)


def features(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return what the output layer of a model of this file gets (B, features) for a batch, in the model's own mode."""
    kept: list[Tensor] = []
    hook = model.get_submodule(str(model.last)).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    try:
        model(inputs)
    finally:
        hook.remove()
    return kept[0]


def mlp(
    inputs: int, width: int, classes: int, hidden: int = 3, activation: str = "relu", dropout: float = 0.0
) -> Network:
    """A multilayer perceptron: `hidden` layers of one width with an activation (and dropout) after each, one output.

    Args:
        inputs: n, numbers a case; images are flattened.
        width: w of the hidden layers; all but the first have square matrices (w, w).
        classes: outputs.
        hidden: number of hidden layers >= 1: "input", "hidden1", ..., then "output".
        activation: "relu", "gelu", "silu" or "identity" (a deep linear network).
        dropout: share of hidden values that are dropped while training, below 1.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(unknown("activation", activation, ACTIVATIONS))
    expect("hidden", hidden, hidden >= 1, "at least 1 hidden layer")
    _check_dropout(dropout)
    names = ["input", *(f"hidden{index}" for index in range(1, hidden))]
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, name in enumerate(names):
        parts[name] = nn.Linear(width if index else inputs, width)
        parts[f"activation{index}"] = ACTIVATIONS[activation]()
        if dropout:
            parts[f"dropout{index}"] = nn.Dropout(dropout)
    parts["output"] = nn.Linear(width, classes)
    return Network(nn.Sequential(parts), names[-1], "output")


def vgg(
    classes: int = 10,
    layers: str | Sequence[int | str] = "vgg11",
    width: int = 512,
    channels: int = 3,
    image: int = 32,
    dropout: float = 0.0,
) -> Network:
    """A VGG with batch norm for small images: 3 x 3 convolutions, then one hidden layer of the given width.

    Args:
        classes: outputs.
        layers: "vgg11", "vgg16" or a list of channels with "M" for each 2 x 2 maximum.
        width: of the hidden linear layer "hidden", the penultimate matrix.
        channels, image: of the input (B, channels, image, image).
        dropout: share of the hidden layer's values that are dropped while training, below 1.
    """
    if isinstance(layers, str) and layers not in VGG:
        raise ValueError(unknown("VGG", layers, VGG))
    _check_dropout(dropout)
    layers = VGG[layers] if isinstance(layers, str) else layers
    side = image // 2 ** sum(layer == "M" for layer in layers)
    expect("image", image, side >= 1, f"a side that survives {sum(layer == 'M' for layer in layers)} halvings")
    parts: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, str):
            parts.append(nn.MaxPool2d(2))
            continue
        parts += [nn.Conv2d(channels, layer, 3, padding=1, bias=False), nn.BatchNorm2d(layer), nn.ReLU()]
        channels = layer
    head = OrderedDict(
        features=nn.Sequential(*parts),
        flatten=nn.Flatten(),
        hidden=nn.Linear(channels * side**2, width),
        activation=nn.ReLU(),
        dropout=nn.Dropout(dropout),
        output=nn.Linear(width, classes),
    )
    return Network(nn.Sequential(head), "hidden", "output")


def resnet(
    classes: int = 10,
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    channels: int = 3,
) -> Network:
    """transformers' ResNet of basic blocks with the stem for small images: one 3 x 3 convolution and no pooling.

    Args:
        classes: outputs.
        widths, depths: channels and number of basic blocks of every stage; the defaults are ResNet-18.
        channels: of the input (B, channels, H, W).

    Its matrices to swap are the last stage's convolutions; the last of them is `penultimate`.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    config: Any = ResNetConfig  # transformers' types lack what its base class takes
    config = config(
        num_channels=channels,
        embedding_size=widths[0],
        hidden_sizes=list(widths),
        depths=list(depths),
        layer_type="basic",
        num_labels=classes,
    )
    body: Any = ResNetForImageClassification(config)
    body.resnet.embedder.embedder.convolution = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
    body.resnet.embedder.pooler = nn.Identity()
    names = [name for name, module in body.named_modules() if isinstance(module, nn.Conv2d) and "shortcut" not in name]
    return Network(body, names[-1], "classifier.1")


def vit(
    classes: int = 10,
    width: int = 192,
    layers: int = 6,
    heads: int = 3,
    image: int = 32,
    patch: int = 4,
    channels: int = 3,
    dropout: float = 0.0,
) -> Network:
    """transformers' vision transformer for small images; the penultimate matrix is the last block's second dense one.

    Args:
        classes: outputs.
        width: of the tokens; the dense layers of a block are 4 times as wide.
        layers, heads: number of blocks, and of attention heads, which divide the width.
        image, patch, channels: of the input (B, channels, image, image) and its square patches.
        dropout: share of hidden values that are dropped while training, below 1.
    """
    from transformers import ViTConfig, ViTForImageClassification

    expect("heads", heads, width % heads == 0, f"a divisor of the width {width}")
    expect("patch", patch, image % patch == 0, f"a divisor of the image's side {image}")
    _check_dropout(dropout)
    config: Any = ViTConfig
    config = config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=image,
        patch_size=patch,
        num_channels=channels,
        num_labels=classes,
        hidden_dropout_prob=dropout,
    )
    body = ViTForImageClassification(config)
    names = [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    return Network(body, names[-2], names[-1])


class GraphConvolution(nn.Module):
    """Layers A relu(... A x W^T) on all nodes of one graph; forward takes node numbers and returns their logits."""

    def __init__(self, inputs: Tensor, edges: Tensor, classes: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("inputs", inputs, persistent=False)
        self.register_buffer("adjacency", normalised_adjacency(edges, len(inputs)).to(inputs.dtype), persistent=False)
        self.dropout = nn.Dropout(dropout)
        names = ["input", *(f"hidden{index}" for index in range(1, hidden))]
        self.names = names
        for index, name in enumerate(names):
            self.add_module(name, nn.Linear(width if index else inputs.shape[1], width))
        self.output = nn.Linear(width, classes)

    def forward(self, nodes: Tensor) -> Tensor:
        """Return logits (B, classes) of the nodes (B,), which see all others."""
        values = self.get_buffer("inputs")
        adjacency = self.get_buffer("adjacency")
        for name in self.names:
            values = torch.relu(adjacency @ self.get_submodule(name)(self.dropout(values)))
        return (adjacency @ self.output(self.dropout(values))).index_select(0, nodes)


def gcn(inputs: Tensor, edges: Tensor, classes: int, width: int = 16, hidden: int = 1, dropout: float = 0.5) -> Network:
    """Kipf and Welling's graph convolution network: `hidden` layers of one width, then the output layer.

    Args:
        inputs: features of the nodes (N, n), float; kept in the model, as is the graph.
        edges: (2, E) int64 node numbers; both directions of an edge are used whether given or not.
        classes: outputs.
        width: of the hidden layers, 16 in the published network.
        hidden: number of hidden layers; the published network has 1, whose penultimate matrix is (width, n).
        dropout: share of each layer's inputs that are dropped while training, below 1.
    """
    expect("edges", tuple(edges.shape), edges.dim() == 2 and edges.shape[0] == 2, "the shape (2, E)")
    expect("hidden", hidden, hidden >= 1, "at least 1 hidden layer")
    _check_dropout(dropout)
    body = GraphConvolution(inputs, edges, classes, width, hidden, dropout)
    return Network(body, body.names[-1], "output")


def normalised_adjacency(edges: Tensor, nodes: int) -> Tensor:
    """Return D^-1/2 (A + I) D^-1/2 (N, N) float64 of the undirected graph: dense, since its products repeat exactly."""
    adjacency = torch.eye(nodes, dtype=torch.float64)
    adjacency[edges[0], edges[1]] = 1
    adjacency[edges[1], edges[0]] = 1
    scale = adjacency.sum(1).rsqrt()
    return scale[:, None] * adjacency * scale


def _check_dropout(dropout: float) -> None:
    expect("dropout", dropout, 0 <= dropout < 1, "a share >= 0 and < 1")
