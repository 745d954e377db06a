"""Optimizers and schedules by their names in torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipelines.config.learning import Train
from pipelines.errors import ConfigError

_ONE_KERNEL = ("Adam", "AdamW")  # an epoch of mnist on a CPU in 0.97 s, before 1.39; of SGD it makes none faster
_LOOPS = {"fused", "foreach", "differentiable"}


def make_optimizer(train: Train, parameters: Sequence[Tensor], *, is_plain: bool = False) -> Optimizer:
    """The optimizer that the config names; Adam in one kernel, unless its parameters choose the loop.

    Args:
        train: Names it.
        parameters: Those that it moves.
        is_plain: Whether it must take them one by one.

    Raises:
        ConfigError: torch refuses a parameter's value.
    """
    cls: Any = getattr(torch.optim, train.optimizer.name)
    params = dict(train.optimizer.params)
    is_real = all(parameter.is_floating_point() for parameter in parameters)  # the kernel takes no others
    if is_plain:
        params["foreach"] = False
    elif train.optimizer.name in _ONE_KERNEL and is_real and not _LOOPS & params.keys():
        params["fused"] = True
    try:
        optimizer: Optimizer = cls(parameters, lr=train.lr, **params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.optimizer: {train.optimizer.name}: {error}") from None
    return optimizer


def make_schedule(train: Train, optimizer: Optimizer, *, total_steps: int) -> LRScheduler | None:
    """The learning-rate schedule that the config names, over `total_steps`.

    Raises:
        ConfigError: torch refuses a parameter's value.
    """
    if train.schedule is None:
        return None
    length = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps"}
    length |= dict.fromkeys(("ConstantLR", "LinearLR", "PolynomialLR"), "total_iters")
    name, params = train.schedule.name, dict(train.schedule.params)
    if name in length:
        params.setdefault(length[name], total_steps)
    if name == "OneCycleLR":
        params.setdefault("max_lr", train.lr)
    cls: Any = getattr(torch.optim.lr_scheduler, name)
    try:
        schedule: LRScheduler = cls(optimizer, **params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.schedule: {name}: {error}") from None
    return schedule
