"""Steps per second of `networks.training.train` on this machine: one network and 20 side by side. Nothing is asserted.

    python benchmarks/networks.py            # on CUDA the sizes of the FashionMNIST figure, under a minute on an H100
    OMP_NUM_THREADS=1 python benchmarks/networks.py --small

The MLP of P2's FashionMNIST figure (784 inputs, three hidden layers of width 784, 10 classes, batch 256, Adam) on
random images of that size, plain, with a deep linear block (3 full factors) and with a compressed one (inner width 20).
Rates are of the best interval between records, so that warm-up and a neighbour's noise stay out.

What to expect of a step, plain, P = 1.85 million numbers a network, S networks:

    operations   6 P B S: 2.8 GFLOP for one, 57 GFLOP for 20. An H100's 67 TFLOP/s of float32 take 0.04 and 0.85 ms,
                 its 495 TFLOP/s of TensorFloat-32 0.006 and 0.12 ms.
    memory       Adam reads parameter, gradient and two moments and writes three of them, 28 bytes a number; forward and
                 backward read the weights once each and write the gradient, 12 bytes: 40 P S bytes, 74 MB for one,
                 1.5 GB for 20, at 3.35 TB/s 0.02 and 0.44 ms.
    launches     about 45 kernels of which each waits for the one before, 2 to 4 microseconds each in a CUDA graph:
                 0.1 to 0.2 ms, which is what one network costs; eager, 5 to 10 times as much from Python.

So the floor of 20 is about 0.45 ms in TensorFloat-32 and 0.9 ms in float32, that of one about 0.15 ms: 3 and 6 times.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import compressible as cd
from compressible.networks import models
from compressible.networks.training import Examples, NetworkHistory, train
from compressible.runtime.devices import device_name, resolve_device

VARIANTS = {"plain": None, "deep": None, "compressed": 20}


def images(count: int, shape: tuple[int, ...], classes: int = 10) -> Examples:
    """Random images with random labels."""
    generator = torch.Generator().manual_seed(0)
    return Examples(
        torch.randn(count, *shape, generator=generator), torch.randint(classes, (count,), generator=generator)
    )


def networks(make: Callable[[], nn.Module], count: int, variant: str, width: int | None) -> list[nn.Module]:
    """`count` networks under seeds of their own, the penultimate matrix swapped."""
    nets = [models.seeded(seed, make) for seed in range(count)]
    for seed, net in enumerate(nets):
        cd.factorize(net, [net.penultimate], variant, width=width, generator=torch.Generator().manual_seed(seed))
    return nets


def step_seconds(history: NetworkHistory) -> float:
    """Seconds a step of the best interval."""
    return float((np.diff(history.seconds) / np.diff(history.steps)).min())


def mlp_rates(width: int, batch_size: int, counts: tuple[int, ...], steps: int, device: str) -> dict[str, float]:
    """Milliseconds a step of all S networks, by variant, S, precision and way to step."""
    data, found = images(10_000, (784,)), {}
    cuda = device != "cpu"
    for variant, inner in VARIANTS.items():
        for count in counts:
            nets = networks(lambda: models.mlp(784, width, 10), count, variant, inner)
            for precision in ("float32", "tf32") if cuda else ("float32",):
                for captured in (True, False) if cuda else (False,):
                    history = train(
                        nets, data, learning_rates=[1e-3] * count, steps=steps, batch_size=batch_size,
                        evaluate_every=steps // 4, precision=precision, captured=captured, device=device,
                    )  # fmt: skip
                    way = "captured" if history.captured else "eager"
                    key = f"{variant}, S = {count}, {precision}, {way}, stacked {history.stacked}"
                    found[key] = round(1e3 * step_seconds(history), 4)
    return found


def image_rates(small: bool, steps: int, device: str) -> dict[str, float]:
    """Milliseconds a step of one ResNet-18 and one ViT on images of 3 x 32 x 32, augmented."""
    data, found = images(2_000, (3, 32, 32)), {}
    resnet = {"widths": (8, 16), "depths": (1, 1)} if small else {}
    vit = {"width": 48, "layers": 2, "heads": 3} if small else {"width": 192, "layers": 9, "heads": 3}
    kinds = {"ResNet": lambda: models.resnet(**resnet), "ViT": lambda: models.vit(**vit)}
    cuda = device != "cpu"
    for name, make in kinds.items():
        net = networks(make, 1, "plain", None)
        for precision in ("float32", "tf32", "bfloat16") if cuda else ("float32",):
            for captured in (True, False) if cuda else (False,):
                history = train(
                    net, data, learning_rates=[1e-3], steps=steps, batch_size=16 if small else 128,
                    augment="crop_and_flip", evaluate_every=steps // 2, precision=precision, captured=captured,
                    device=device,
                )  # fmt: skip
                key = f"{name}, {precision}, {'captured' if history.captured else 'eager'}"
                found[key] = round(1e3 * step_seconds(history), 3)
                found[f"{key}, peak MB"] = round(history.peak_memory_bytes / 1e6)
    return found


def ratios(times: dict[str, float], counts: tuple[int, ...]) -> dict[str, float]:
    """Time of the many over the time of one, each way to step on its own."""
    found = {}
    for key, value in times.items():
        many = next(
            (k for k in times if k.startswith(key.split(", stacked")[0].replace("S = 1,", f"S = {counts[1]},"))), ""
        )
        if "S = 1," in key and many:
            found[key.split(", stacked")[0].replace("S = 1", f"S = {counts[1]} over 1")] = round(times[many] / value, 2)
    return found


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU core")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    given = parser.parse_args()
    device, began = resolve_device(given.device), time.perf_counter()
    small = given.small or device == "cpu"
    counts = (1, 4) if small else (1, 20)
    times = mlp_rates(64 if small else 784, 32 if small else 256, counts, 40 if small else 320, device)
    result = {
        "device": device_name(device),
        "MLP, ms a step of all S": times,
        f"{counts[1]} networks over one": ratios(times, counts),
        "images, ms a step": image_rates(small, 4 if small else 48, device),
        "seconds of all": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
