"""Trains the glyph teacher (or takes it from the cache), measures its samples and draws them beside real glyphs.

``python docs/_glyph_teacher.py``: two minutes of training on one core, and about one of sampling.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.core.run import Run
from stillhouse.data.glyphs import glyphs
from stillhouse.diffusion.samplers import ddim
from stillhouse.metrics.generative import energy_distance, frechet_distance, random_features, sliced_wasserstein
from stillhouse.systems.diffusion.dmd2 import DMD2
from stillhouse.tasks.diffusion import DiffusionTask
from stillhouse.tasks.pictures import sample_picture

COUNT, STEPS, CLASSES = 1000, 50, 10


def teacher() -> Any:
    """The embedded teacher on glyphs, as every run with ``data=glyphs`` has it."""
    found = []

    def stages() -> Generator[Any, Any, None]:
        found.append((yield from DiffusionTask.prepare(DMD2.make(data="glyphs"), run)).teacher)

    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), quiet=True)
        run.execute(stages())
    return found[0].eval()


def classifier() -> nn.Module:
    """A small convolutional network trained on the training glyphs, under a little noise."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    data, optimizer = glyphs("train"), torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(10):
        for rows in torch.randperm(len(data)).split(64):
            batch = data[rows.tolist()]
            pixels = 2 * batch["pixel_values"] - 1
            loss = nn.functional.cross_entropy(net(pixels + 0.1 * torch.randn_like(pixels)), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def sampled(denoiser: Any, labels_N: Tensor) -> Tensor:
    """DDIM samples of every label, without guidance."""
    process, random, found = denoiser.process, torch.Generator().manual_seed(0), []
    for part in labels_N.split(250):
        noise = torch.randn(len(part), 1, 16, 16, generator=random)

        def denoise(x: Tensor, t: Tensor, part: Tensor = part) -> Tensor:
            return denoiser(x, t, part)

        found.append(ddim(denoise, noise, process.few_step_times(STEPS), process))
    return torch.cat(found)


@torch.no_grad()
def report(name: str, samples_N: Tensor, labels_N: Tensor, judge: nn.Module) -> None:
    """One line of the table on the page."""
    right_N = judge(samples_N).argmax(-1) == labels_N
    worst = min(float(right_N[labels_N == label].float().mean()) for label in range(CLASSES))
    real = 2 * glyphs("test").pixels - 1
    nearest = torch.cdist(samples_N[:500].flatten(1), (2 * glyphs("train").pixels - 1).flatten(1)).min(1).values
    distances = (
        sliced_wasserstein(samples_N, real),
        energy_distance(samples_N, real[: len(samples_N)]),
        frechet_distance(random_features(samples_N), random_features(real)),
    )
    figures = " | ".join(f"{one:.4f}" for one in distances)
    print(f"| {name} | {right_N.float().mean():.1%} | {worst:.1%} | {figures} | {nearest.median():.2f} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    begun = time.process_time()
    denoiser = teacher()
    print(f"teacher: {time.process_time() - begun:.0f} s of CPU")
    judge, labels_N = classifier(), torch.arange(COUNT) % CLASSES
    other = glyphs("selection")
    real = 2 * other.pixels - 1
    report("other real glyphs", real[:COUNT], other.labels[:COUNT], judge)
    noise = torch.randn(COUNT, 1, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    report("noise", noise, labels_N, judge)
    samples = sampled(denoiser, labels_N)
    report("teacher", samples, labels_N, judge)
    draw(real, other.labels, samples)


def draw(real_N: Tensor, labels_N: Tensor, samples_N: Tensor) -> None:
    """Real glyphs of the same labels, in the same places, beside the first samples."""
    places = [(labels_N == number % CLASSES).nonzero()[number // CLASSES, 0] for number in range(64)]
    picture = sample_picture({"real glyphs": real_N[torch.stack(places)], "the teacher's": samples_N[:64]})
    (Path(__file__).parent / "tasks" / "glyph-teacher.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
