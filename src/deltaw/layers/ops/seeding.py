"""torch's random numbers from a seed, while a block is open; afterwards the user's generators have their states back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import torch
from torch import nn


def mixed(*parts: object) -> int:
    """Return a seed of 63 bits made of several numbers or texts: equal ones give the same seed on every machine.

    >>> mixed(1, "b") == mixed(1, "b"), mixed(1, "b") == mixed(2, "b")
    (True, False)
    """
    return random.Random(" ".join(map(str, parts))).getrandbits(63)  # a text is hashed with SHA-512


@contextlib.contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Open a block in which the generators of the CPU and of these devices draw from `seed`; after it, they have their states
    back.

    Generators of other devices are neither seeded nor read, unlike by `torch.manual_seed`.
    """
    generators = [torch.default_generator, *(one for device in set(devices) if (one := _generator(device)) is not None)]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices that a model's parameters lie on and draw random numbers on."""
    return {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}


class _OfMPS:
    """The generator of Apple's GPU, which torch gives no object for."""

    get_state, set_state = staticmethod(torch.mps.get_rng_state), staticmethod(torch.mps.set_rng_state)
    manual_seed = staticmethod(torch.mps.manual_seed)


def _generator(device: torch.device) -> torch.Generator | type[_OfMPS] | None:
    """Return a device's generator; None for a device without one."""
    if device.type == "mps":
        return _OfMPS
    module = torch.get_device_module(device) if device.type != "cpu" else None
    every = getattr(module, "default_generators", None)  # CUDA's, and other accelerators' that follow it
    if not every:
        return None
    generator: torch.Generator = every[
        torch.accelerator.current_device_index() if device.index is None else device.index
    ]
    return generator
