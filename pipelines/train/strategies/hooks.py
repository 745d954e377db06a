"""Compressed exchange of gradients: communication hooks of DistributedDataParallel.

A hook is given a bucket, the gradients of some parameters as one flat tensor, and gives the mean over the ranks.
"""

from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pipelines.config import strategies as config
from pipelines.errors import ConfigError


class Hook(Protocol):
    """A way of exchanging gradients, with what it holds back between steps."""

    def register(self, network: DistributedDataParallel) -> None:
        """Have the network exchange its gradients so from now on."""

    def state(self) -> dict[str, Tensor]:
        """What this rank holds back."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from that."""


def make_hook(options: config.Hook) -> Hook | None:
    """The hook of the config; None where gradients are exchanged as they are."""
    if isinstance(options, config.Half):
        return Half(options.name)
    if isinstance(options, config.PowerSGD):
        return PowerSGD(options.rank, options.warmup_steps)
    if isinstance(options, config.TopK):
        return TopK(options.share, options.warmup_steps)
    return QSGD(options.bits) if isinstance(options, config.QSGD) else None


class Half:
    """Gradients in 16 bits; the mean is taken in them."""

    def __init__(self, name: str) -> None:
        self._name = name

    def register(self, network: DistributedDataParallel) -> None:
        """Raises ConfigError where the backend does not take the format."""
        hook = default_hooks.fp16_compress_hook if self._name == "fp16" else default_hooks.bf16_compress_hook
        try:
            network.register_comm_hook(None, hook)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"train.strategy.hook: {self._name}: not with this backend: {error}") from None

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing."""


class PowerSGD:
    """Thin matrices P and Q with M near P Q^T (T. Vogels et al., NeurIPS 2019), as torch has it."""

    def __init__(self, rank: int, warmup_steps: int) -> None:
        self._state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=warmup_steps, min_compression_rate=1
        )

    def register(self, network: DistributedDataParallel) -> None:
        """See `Hook`."""
        network.register_comm_hook(self._state, _powersgd)

    def state(self) -> dict[str, Tensor]:
        """Errors and thin matrices by bucket, the step, and the generator that begins thin matrices."""
        generator: Any = self._state.rng.get_state()
        found = {"step": torch.tensor(self._state.iter), "rng": torch.from_numpy(generator[1].astype(np.int64))}
        found["rng_place"] = torch.tensor(generator[2])
        for name, values in self._kept().items():
            found |= {f"{name}.{bucket}": tensor.detach().cpu() for bucket, tensor in values.items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """See `Hook`."""
        self._state.iter = int(state["step"])
        words = state["rng"].numpy().astype(np.uint32)
        self._state.rng.set_state(("MT19937", words, int(state["rng_place"]), 0, 0.0))
        for name, values in self._kept().items():
            values.update({int(k.split(".")[1]): x for k, x in state.items() if k.startswith(f"{name}.")})

    def _kept(self) -> dict[str, dict[int, Tensor]]:
        state = self._state
        return {"error": state.error_dict, "p": state.p_memory_dict, "q": state.q_memory_dict}


def _powersgd(state: powerSGD_hook.PowerSGDState, bucket: GradBucket) -> Future[Tensor]:
    """Its exchanges of a bucket follow one from the other in gloo's threads; let loose on two buckets at once, they meet
    those of another rank in another order.

    What is computed between them runs in this thread or in gloo's, as it happens, and rounds by the number of threads
    that a thread computes with: gloo's have one (OMP_NUM_THREADS), so this one has, too, meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        if bucket.index() in kept:  # a checkpoint's are on the CPU
            kept[bucket.index()] = kept[bucket.index()].to(bucket.buffer().device)
    future: Future[Tensor] = powerSGD_hook.powerSGD_hook(state, bucket)
    future.wait()
    torch.set_num_threads(threads)
    return future


class TopK:
    """The numbers of largest magnitude and their places, gathered from all ranks (Y. Lin et al., Deep gradient
    compression, ICLR 2018; S. Stich et al., Sparsified SGD with memory, NeurIPS 2018). What is left out is added to the
    next gradient of the same bucket.

    Args:
        share: Of a bucket's numbers, once warm.
        warmup_steps: Over which the share falls from 1 to that, by the same factor a step.
    """

    def __init__(self, share: float, warmup_steps: int) -> None:
        self._share, self._warmup_steps, self.step = share, warmup_steps, 0
        self._errors: dict[int, Tensor] = {}

    def register(self, network: DistributedDataParallel) -> None:
        """See `Hook`."""
        network.register_comm_hook(self, _topk)

    def num(self, size: int) -> int:
        """How many of a bucket's numbers are sent at this step."""
        warmth = min(1.0, self.step / self._warmup_steps) if self._warmup_steps else 1.0
        return max(1, round(size * float(self._share**warmth)))

    def with_error(self, bucket: GradBucket) -> Tensor:
        """The bucket's gradients and what was left out before."""
        gradient: Tensor = bucket.buffer()
        error = self._errors.get(bucket.index())
        return gradient if error is None or error.shape != gradient.shape else gradient + error.to(gradient.device)

    def keep_error(self, bucket: GradBucket, error: Tensor) -> None:
        """What is left out now; behind the last bucket the step is over."""
        self._errors[bucket.index()] = error
        self.step += bucket.is_last()

    def state(self) -> dict[str, Tensor]:
        """Errors by bucket, and the step."""
        errors = {f"error.{bucket}": error.cpu() for bucket, error in self._errors.items()}
        return {"step": torch.tensor(self.step), **errors}

    def load(self, state: dict[str, Tensor]) -> None:
        """See `Hook`."""
        self.step = int(state["step"])
        self._errors = {int(k.split(".")[1]): x for k, x in state.items() if k.startswith("error.")}


def _topk(state: TopK, bucket: GradBucket) -> Future[Tensor]:
    gradient = state.with_error(bucket)
    places = gradient.abs().topk(state.num(gradient.numel()), sorted=False).indices
    values = gradient[places]
    state.keep_error(bucket, gradient.index_fill(0, places, 0.0))
    message = torch.cat([values.view(torch.uint8), places.int().view(torch.uint8)])

    def mean(messages: list[Tensor]) -> Tensor:
        total = torch.zeros_like(gradient)
        for theirs in messages:
            numbers, at = theirs[: values.nbytes], theirs[values.nbytes :]
            total.index_add_(0, at.view(torch.int32).long(), numbers.view(gradient.dtype))
        return total / len(messages)

    return _gathered(message, mean)


class QSGD:
    """Each number becomes one of 2^(bits - 1) - 1 steps of its chunk's largest, up or down at random, so that it is right
    on average (D. Alistarh et al., QSGD, NeurIPS 2017, with the largest for the norm).

    Args:
        bits: Of a number, its sign among them.
    """

    def __init__(self, bits: int) -> None:
        self.bits, self.generator = bits, torch.Generator()
        self.generator.manual_seed(dist.get_rank())

    def register(self, network: DistributedDataParallel) -> None:
        """See `Hook`."""
        network.register_comm_hook(self, _qsgd)

    def state(self) -> dict[str, Tensor]:
        """The generator."""
        return {"rng": self.generator.get_state()}

    def load(self, state: dict[str, Tensor]) -> None:
        """See `Hook`."""
        self.generator.set_state(state["rng"])

    def encode(self, numbers: Tensor) -> Tensor:
        """Scales of the chunks and the steps, packed into bytes. Shape (n,) to (bytes,)."""
        top = 2 ** (self.bits - 1) - 1
        chunks = torch.nn.functional.pad(numbers.float(), (0, -len(numbers) % config.QSGD_CHUNK)).view(
            -1, config.QSGD_CHUNK
        )
        scales = chunks.abs().amax(dim=1, keepdim=True)
        noise = torch.rand(chunks.shape, generator=self.generator).to(chunks.device)
        steps = torch.floor(chunks / scales.clamp(min=torch.finfo(torch.float32).tiny) * top + noise) + top
        packed = steps.clamp(0, 2 * top).to(torch.uint8).view(-1, 8 // self.bits)
        shifts = self.bits * torch.arange(8 // self.bits, dtype=torch.uint8, device=packed.device)
        return torch.cat([scales.view(-1).view(torch.uint8), (packed << shifts).sum(1, dtype=torch.uint8)])

    def decode(self, message: Tensor, num: int) -> Tensor:
        """The numbers again. Shape (bytes,) to (num,)."""
        top, chunks = 2 ** (self.bits - 1) - 1, -(-num // config.QSGD_CHUNK)
        scales, packed = message[: 4 * chunks].view(torch.float32), message[4 * chunks :]
        shifts = self.bits * torch.arange(8 // self.bits, dtype=torch.uint8, device=message.device)
        steps = (packed[:, None] >> shifts) & (2**self.bits - 1)
        numbers: Tensor = (steps.view(chunks, config.QSGD_CHUNK).float() - top) * (scales[:, None] / top)
        return numbers.view(-1)[:num]


def _qsgd(state: QSGD, bucket: GradBucket) -> Future[Tensor]:
    gradient = bucket.buffer()

    def mean(messages: list[Tensor]) -> Tensor:
        total = sum((state.decode(theirs, gradient.numel()) for theirs in messages), torch.zeros(()))
        return (total / len(messages)).to(gradient.dtype)

    return _gathered(state.encode(gradient), mean)


def _gathered(message: Tensor, mean: Any) -> Future[Tensor]:
    """The messages of all ranks, and then their mean."""
    messages = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    work = dist.all_gather(messages, message, async_op=True)
    assert work is not None, "asynchronous"
    future: Future[Tensor] = work.get_future().then(lambda _: mean(messages))
    return future
