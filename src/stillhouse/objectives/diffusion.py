"""Terms for diffusion models: denoising, distribution matching, the two sides of a GAN; and views of noised samples.

Entries of the batch hold the noise and the times, so that models that are compared see the same x_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Observed, Signal, View
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.processes import Process
from stillhouse.losses.adversarial import non_saturating_discriminator, non_saturating_generator
from stillhouse.losses.score import denoising, distribution_matching


def at_noise(model: Observed, process: Process, level: str, *, x: Signal | str = "real") -> View:
    """A denoiser on noised samples.

    Args:
        level: names the noise: entries ``{level}_t`` (times) and ``{level}_eps`` of the batch.
        x: the clean samples: an entry of the batch (its classes in ``{x}_labels``), or what another model yields from
            the batch's ``class_labels``; gradients flow through a signal unless it is detached.
    """
    entry = x if isinstance(x, str) else f"{level}_x"

    def noised(batch: Batch) -> Batch:
        sample = process.add_noise(batch[entry], batch[f"{level}_eps"], batch[f"{level}_t"])
        labels = {"class_labels": batch[f"{entry}_labels"]} if f"{entry}_labels" in batch else {}
        return {**batch, **labels, "sample": sample, "timestep": batch[f"{level}_t"]}

    return model.view(f"{level}:{entry}", noised, feed=None if isinstance(x, str) else {entry: x})


class Denoising(Term):
    """Denoising score matching: the error of a denoiser's x_0, weighted as if its network's output were compared.

    Args:
        prediction: the denoiser at a level of noise (`at_noise`).
        x: the clean samples: a signal, or an entry of the batch.
        level: as in `at_noise`.
        denoiser: whose process and parameterisation give the weights.
    """

    def __init__(
        self, prediction: Signal, *, x: Signal | str, level: str, denoiser: Denoiser, name: str | None = None
    ) -> None:
        signals = {"prediction": prediction}
        if isinstance(x, Signal):
            signals["x"] = x.detach()
        super().__init__(name=name, **signals)
        self.entry = x if isinstance(x, str) else None
        self.level = level
        self.process = denoiser.process
        self.parameterisation = denoiser.parameterisation

    def compute(self, *, prediction: Tensor, batch: Batch, x: Tensor | None = None, **_: Any) -> Tensor:
        clean: Tensor = x if self.entry is None else batch[self.entry]  # type: ignore[assignment]
        t_B = batch[f"{self.level}_t"]
        weight_B = self.parameterisation.weight(self.process.alpha(t_B), self.process.sigma(t_B))
        return denoising(prediction, clean, weight_B.to(prediction.dtype))


class DistributionMatching(Term):
    """The generator's sample follows the difference of critic and teacher; see `distribution_matching`."""

    def __init__(
        self, x: Signal, fake: Signal, real: Signal, *, normalise: bool = True, name: str | None = None
    ) -> None:
        super().__init__(name=name, x=x, fake=fake.detach(), real=real.detach())
        self.normalise = normalise

    def compute(self, *, x: Tensor, fake: Tensor, real: Tensor, **_: Any) -> Tensor:
        return distribution_matching(x, fake, real, normalise=self.normalise)


class GeneratorGAN(Term):
    """What the generator makes is to be taken for real: ``loss(fake logits)``."""

    def __init__(
        self, fake: Signal, *, loss: Callable[[Tensor], Tensor] = non_saturating_generator, name: str | None = None
    ) -> None:
        super().__init__(name=name, fake=fake)
        self.loss = loss

    def compute(self, *, fake: Tensor, **_: Any) -> Tensor:
        return self.loss(fake)


class DiscriminatorGAN(Term):
    """Real data are to be told from what the generator makes: ``loss(real, fake)``; logs how often they are."""

    def __init__(
        self,
        real: Signal,
        fake: Signal,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] = non_saturating_discriminator,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, real=real, fake=fake)
        self.loss = loss

    def compute(self, *, real: Tensor, fake: Tensor, **_: Any) -> Tensor:
        self.log("told_apart", ((real > 0).float().mean() + (fake < 0).float().mean()) / 2)
        return self.loss(real, fake)


class SampleMSE(Term):
    """Mean squared error between two models' samples: regression on pairs of noise and teacher sample."""

    def __init__(self, student: Signal, teacher: Signal, *, name: str | None = None) -> None:
        super().__init__(name=name, student=student, teacher=teacher.detach())

    def compute(self, *, student: Tensor, teacher: Tensor, **_: Any) -> Tensor:
        return (student - teacher).square().mean()
