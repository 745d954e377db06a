"""The section `train.strategy`: how the ranks share the work."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from pipelines.config.base import Natural, Positive, Section, known_name

PARTS_A_STAGE = 4  # into which a pipeline cuts a batch, where nothing else is said
QSGD_CHUNK = 512  # numbers that share a scale; D. Alistarh et al. use as many


def _named(what: str, sections: Any) -> BeforeValidator:
    """A bare name stands for its section's defaults; one that is not known is answered with the nearest."""
    names = [name for section in get_args(sections) for name in get_args(section.model_fields["name"].annotation)]

    def named(value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, Section) and not (isinstance(value, dict) and isinstance(value.get("name"), str)):
            raise ValueError(
                f"wanted {what}, a name or {{name: ..., ...}}, of {', '.join(sorted(names))}; seen {value!r}"
            )
        if isinstance(value, dict):
            known_name(what, value["name"], names)
        return value

    return BeforeValidator(named)


class NoHook(Section):
    """Gradients are exchanged as they are."""

    name: Literal["none"] = "none"


class Half(Section):
    """Gradients are exchanged in 16 bits."""

    name: Literal["fp16", "bf16"]


class PowerSGD(Section):
    """A matrix of gradients is exchanged as a product of two thin ones, what that leaves out is added to the next."""

    name: Literal["powersgd"] = "powersgd"
    rank: Positive = Field(default=1, description="Columns of the thin matrices.")
    warmup_steps: Annotated[int, Field(ge=2)] = Field(default=100, description="First steps, exchanged as they are.")


class TopK(Section):
    """The largest gradients are exchanged, what is left out is added to the next."""

    name: Literal["topk"] = "topk"
    share: Annotated[float, Field(gt=0, le=1)] = Field(default=0.01, description="Of the numbers, how many.")
    warmup_steps: Natural = Field(default=100, description="Over which the share falls from 1, by equal factors.")


class QSGD(Section):
    """Gradients are exchanged in a few bits each, rounded at random so that they are right on average."""

    name: Literal["qsgd"] = "qsgd"
    bits: Literal[2, 4, 8] = Field(default=8, description="Of a number.")


_Hooks = NoHook | Half | PowerSGD | TopK | QSGD
Hook = Annotated[_Hooks, Field(discriminator="name"), _named("a hook", _Hooks)]


class DataParallel(Section):
    """Each rank holds the whole network and takes its lanes' rows; gradients are averaged at every step."""

    name: Literal["data_parallel"] = "data_parallel"
    hook: Hook = Field(
        default=NoHook(), description="How gradients are compressed for the exchange; a name, or with its parameters."
    )


class Sharded(Section):
    """Each rank holds 1/ranks of parameters, gradients and optimizer state (FSDP2), and takes its lanes' rows."""

    name: Literal["sharded"] = "sharded"


class TensorParallel(Section):
    """Matrices are cut over the ranks of a group, which read the same rows; groups split the rows."""

    name: Literal["tensor_parallel"] = "tensor_parallel"
    size: Positive | None = Field(
        default=None, description="Ranks that hold one network together. Default: all. Divides `ranks`."
    )


class PipelineParallel(Section):
    """Layers are cut into stages, one a rank of a group; parts of a batch pass through them one behind the other."""

    name: Literal["pipeline_parallel"] = "pipeline_parallel"
    size: Positive | None = Field(default=None, description="Stages of a group. Default: all ranks. Divides `ranks`.")
    schedule: Literal["1F1B", "GPipe"] = Field(
        default="1F1B",
        description="GPipe: all parts forward, then all backward. 1F1B: a part goes backward as soon as it can, so that a "
        "stage holds no more parts than there are stages.",
    )


class LocalSGD(Section):
    """Ranks train alone for some steps, and then average their weights."""

    name: Literal["local_sgd"] = "local_sgd"
    every_steps: Positive = Field(default=64, description="Steps between averages; there is one behind each epoch too.")
    warmup_steps: Natural = Field(default=0, description="First steps of the run, with gradients exchanged at each.")


class DiLoCo(Section):
    """Ranks train alone for some steps; the mean of what they moved is the gradient of an outer Nesterov step."""

    name: Literal["diloco"] = "diloco"
    every_steps: Positive = Field(
        default=64, description="Steps between outer steps; there is one behind each epoch too."
    )
    warmup_steps: Natural = Field(default=0, description="First steps of the run, with gradients exchanged at each.")
    outer_lr: Annotated[float, Field(gt=0)] = Field(default=0.7, description="Learning rate of the outer step.")
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="Its Nesterov momentum.")


class ParameterServer(Section):
    """Servers hold the parameters, a part each; the other ranks pull them, and push gradients when they have them."""

    name: Literal["parameter_server"] = "parameter_server"
    servers: Positive = Field(default=1, description="The first so many ranks are servers, the others workers.")
    max_staleness: Natural | None = Field(
        default=None,
        description="A gradient of weights that were updated more often since is refused, and taken anew. Default: four "
        "times the workers.",
    )
    scale: bool = Field(default=True, description="Divide a gradient by its staleness.")


class BackupWorkers(Section):
    """Rank 0 holds the parameters and takes the first gradients of each step; what comes late is taken anew."""

    name: Literal["backup_workers"] = "backup_workers"
    backups: Positive = Field(default=1, description="Workers beyond those whose gradients make a step.")


class Gossip(Section):
    """Peers have a network each and average it with one other at a time; rank 0 only keeps the book of rows."""

    name: Literal["gossip"] = "gossip"
    every_steps: Positive = Field(default=1, description="A peer's steps between two sends of half its weight.")


class Auto(Section):
    """The fastest strategy that fits the ranks' memory, found by a few steps of each in front of the training."""

    name: Literal["auto"] = "auto"
    lossy: bool = Field(
        default=False,
        description="Try strategies too that learn something else than one process would: fp16 and PowerSGD, local SGD.",
    )


Local = LocalSGD | DiLoCo  # ranks that train alone for some steps
Elastic = ParameterServer | BackupWorkers | Gossip  # ranks that no collective joins, so that one can be lost
_Strategies = DataParallel | Sharded | TensorParallel | PipelineParallel | Local | Elastic | Auto
Strategy = Annotated[_Strategies, Field(discriminator="name"), _named("a strategy", _Strategies)]


def num_servers(strategy: Section) -> int:
    """Ranks that train on no rows."""
    return strategy.servers if isinstance(strategy, ParameterServer) else int(isinstance(strategy, Elastic))


def group_size(strategy: Section, ranks: int) -> int:
    """Ranks that hold one network together, and so read the same rows."""
    if isinstance(strategy, TensorParallel | PipelineParallel):
        return strategy.size or ranks
    return 1


def num_groups(strategy: Section, ranks: int) -> int:
    """Parts into which the ranks split the rows of a batch."""
    if isinstance(strategy, Elastic):
        backups = strategy.backups if isinstance(strategy, BackupWorkers) else 0
        return ranks - num_servers(strategy) - backups
    return ranks // group_size(strategy, ranks)


def warmup_steps(strategy: Section) -> int:
    """First steps at which gradients are exchanged whole; 0 where there are none."""
    inner = strategy.hook if isinstance(strategy, DataParallel) else strategy
    return inner.warmup_steps if isinstance(inner, PowerSGD | Local) else 0


def what_is_learned(strategy: Section) -> dict[str, Any] | None:
    """The strategy as far as it changes what is learned; None where it learns what one process alone would."""
    is_hooked = isinstance(strategy, DataParallel) and not isinstance(strategy.hook, NoHook)
    is_lossy = is_hooked or (isinstance(strategy, Auto) and strategy.lossy)
    if is_lossy or isinstance(strategy, Local | Elastic):
        return strategy.model_dump(mode="json")
    return None
