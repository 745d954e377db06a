"""The sections of what learns: MLlib estimators, the torch network and its training."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipelines.config import catalog
from pipelines.config.base import Name, Positive, Section, known_name
from pipelines.config.strategies import (
    PARTS_A_STAGE,
    Auto,
    DataParallel,
    Elastic,
    PipelineParallel,
    Strategy,
    group_size,
    num_groups,
    num_servers,
    warmup_steps,
    what_is_learned,
)


class Estimator(Section):
    """An MLlib estimator with its own parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    estimator: str = Field(
        description="The estimator's class name.", json_schema_extra={"enum": [*sorted(catalog.ESTIMATORS)]}
    )
    inputs: Annotated[list[Name], Field(min_length=1)] | None = Field(
        default=None, description="Which of `features.inputs` it reads. Default: all."
    )

    @model_validator(mode="after")
    def _known(self) -> "Estimator":
        known_name("an estimator", self.estimator, list(catalog.ESTIMATORS))
        for name in self.params:
            known_name(f"a parameter of {self.estimator}", name, catalog.ESTIMATORS[self.estimator])
        return self

    @property
    def params(self) -> dict[str, Any]:
        """The estimator's parameters as written."""
        return dict(self.model_extra or {})

    @property
    def gives(self) -> Literal["prediction", "affinity"]:
        """The label, or with ALS's `implicitPrefs` how well an item suits a user."""
        return "affinity" if self.params.get("implicitPrefs") else "prediction"

    @property
    def stops_early(self) -> bool:
        """Whether it watches the validation split, which MLlib's boosted trees do by `validationTol`."""
        return "validationTol" in self.params


class Model(Section):
    """A torch network with its own parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    network: str = Field(
        description="softmax, mlp, cnn, deep_and_cross, dlrm, two_tower, gpt, or `package.module:Class` of your own; its "
        "constructor's parameters stand beside it.",
        examples=sorted(catalog.NETWORKS),
    )

    @model_validator(mode="after")
    def _known(self) -> "Model":
        if ":" not in self.network:
            known_name("a network or a path 'module:Class'", self.network, list(catalog.NETWORKS))
            for name in self.params:
                known_name(f"a parameter of {self.network}", name, catalog.NETWORKS[self.network])
        return self

    @property
    def params(self) -> dict[str, Any]:
        """The network's parameters as written."""
        return dict(self.model_extra or {})


class Named(Section):
    """An optimizer or a schedule by its torch name, with its own parameters; a bare name stands for defaults."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(description="The class name in torch.")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as written."""
        return dict(self.model_extra or {})


class Optimizer(Named):
    """An optimizer of torch.optim."""

    name: str = Field(
        default="Adam",
        description="The class name in torch.optim.",
        json_schema_extra={"enum": [*sorted(catalog.OPTIMIZERS)]},
    )

    @model_validator(mode="after")
    def _known(self) -> "Optimizer":
        known_name("an optimizer", self.name, list(catalog.OPTIMIZERS))
        for name in self.params:
            known_name(f"a parameter of {self.name}", name, catalog.OPTIMIZERS[self.name])
        return self


class Schedule(Named):
    """A learning-rate schedule of torch.optim.lr_scheduler, stepped after every batch."""

    name: str = Field(
        description="The class name in torch.optim.lr_scheduler. `T_max`, `total_steps` and `total_iters` default "
        "to the steps of the whole run.",
        json_schema_extra={"enum": [*sorted(catalog.SCHEDULES)]},
    )

    @model_validator(mode="after")
    def _known(self) -> "Schedule":
        known_name("a schedule", self.name, list(catalog.SCHEDULES))
        for name in self.params:
            known_name(f"a parameter of {self.name}", name, catalog.SCHEDULES[self.name])
        return self


class EarlyStopping(Section):
    """Stop when the validation split no longer improves, and keep the best epoch."""

    metric: str = Field(
        default="loss",
        description="The validation metric watched: loss, or one of the label's kind that a validation pass gives, which is "
        "all but ks, and log_loss, which is the loss.",
    )
    patience: Positive = Field(default=3, description="Epochs without improvement before the run stops.")


class Checkpoint(Section):
    """When to leave a checkpoint inside an epoch; there is one behind each epoch anyway."""

    every_s: Annotated[float, Field(gt=0)] = Field(default=60.0, description="Seconds between checkpoints.")
    every_steps: Positive | None = Field(default=None, description="Steps between checkpoints, instead of seconds.")


HOW_NOT_WHAT = (  # settings of train that change how a network is learned, not which
    "ranks",
    "launcher",
    "device",
    "compile",
    "threads",
    "prefetch_mb",
    "read_threads",
    "memory_mb",
    "balance",
    "strategy",
    "micro_batches",
    "checkpoint",
    "timeout_s",
    "max_restarts",
)


class Train(Section):
    """Distributed training of the network."""

    ranks: Positive = Field(default=2, description="Processes that train together.")
    lanes: Positive | None = Field(
        default=None,
        description="Parallel row streams an epoch is cut into; batch_size is divisible by it. Default: the largest "
        "divisor of batch_size that is at most 16 and at least the ranks.",
    )
    window: Positive = Field(default=4, description="Shards whose rows are shuffled together.")
    batch_size: Positive = Field(default=256, description="Rows of a step over all ranks (the global batch).")
    epochs: Positive = Field(default=5, description="Passes over the training split.")
    lr: Annotated[float, Field(gt=0)] = Field(default=1e-3, description="Learning rate.")
    optimizer: Optimizer = Field(default=Optimizer(), description="Adam, SGD, AdamW, ... with its parameters.")
    schedule: Schedule | None = Field(default=None, description="How the learning rate moves over the run.")
    early_stopping: EarlyStopping | None = Field(default=None, description="Stop on the validation split.")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Clip the norm of the gradient to this."
    )
    strategy: Strategy = Field(
        default=DataParallel(), description="How the ranks share the work; a name, or with its parameters."
    )
    micro_batches: Positive | None = Field(
        default=None,
        description="Parts into which a rank cuts its rows of a batch: less memory, the same gradient. Default: 1; of a "
        "pipeline up to four a stage.",
    )
    launcher: Literal["auto", "spark", "torchrun"] = Field(
        default="auto",
        description="spark: TorchDistributor. torchrun: no Spark needed. auto: spark where a session is up or the "
        "master is not local, else torchrun.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where every rank has one.")
    amp: bool = Field(default=True, description="bf16 autocast on CUDA devices.")
    compile: bool = Field(
        default=False,
        description="Compile the network by torch.compile in front of the first step, which takes a rank up to half a minute "
        "and a C++ compiler.",
    )
    threads: Positive | None = Field(
        default=None,
        description="torch threads a rank. Default: its share of the machine's cores, less one that reads.",
    )
    prefetch_mb: Positive = Field(
        default=64,
        description="Memory a rank may hold in rows read ahead, in MB; up to twice that where one epoch meets the next.",
    )
    balance: Literal["off", "auto"] = Field(
        default="off",
        description="auto: lanes move away from ranks that are slow, with data_parallel without a hook and sharded. The rows of each batch stay the same, but sums over "
        "ranks are rounded otherwise; off: runs are equal bit for bit.",
    )
    checkpoint: Checkpoint = Field(
        default=Checkpoint(), description="Checkpoints inside an epoch; training goes on from the last one."
    )
    memory_mb: Positive | None = Field(
        default=None, description="Memory of a rank, for `make plan`. Default: its share of what the machine has free."
    )
    read_threads: Positive = Field(default=2, description="Threads a rank that read shards side by side.")
    timeout_s: Positive = Field(
        default=300, description="A rank that does not get on for so many seconds is named, and all ranks end."
    )
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        default=2, description="How often the run starts again from its last checkpoint when a rank is lost."
    )

    @model_validator(mode="after")
    def _strategy_fits(self) -> "Train":
        name, size = self.strategy.name, group_size(self.strategy, self.ranks)
        if self.ranks % size:
            raise ValueError(f"strategy.size: wanted a divisor of the {self.ranks} ranks, seen {size}")
        if (num := num_groups(self.strategy, self.ranks)) < 1 < self.ranks:
            raise ValueError(
                f"ranks: wanted at least {self.ranks + 1 - num} for {name}, whose servers and backups leave no worker of "
                f"{self.ranks}"
            )
        if self.balance == "auto" and size > 1:
            raise ValueError(f"balance: wanted off with {name}, whose ranks read the same rows; seen auto")
        if self.balance == "auto" and self.is_elastic:
            raise ValueError(f"balance: wanted off with {name}, where work moves by itself; seen auto")
        if (
            self.balance == "auto"
            and self.ranks > 1
            and not isinstance(self.strategy, Auto)
            and what_is_learned(self.strategy)
        ):
            raise ValueError(
                f"balance: wanted off with {name}, where other lanes on a rank change what is learned; seen auto"
            )
        is_1f1b = isinstance(self.strategy, PipelineParallel) and self.strategy.schedule == "1F1B"
        if is_1f1b and self.num_micro_batches < size:
            raise ValueError(
                f"micro_batches: wanted one for each of the {size} stages with 1F1B, seen {self.num_micro_batches}; raise "
                "it and batch_size, or set strategy.schedule: GPipe"
            )
        return self

    @model_validator(mode="after")
    def _lanes_fit(self) -> "Train":
        batch, ranks = self.batch_size, self.data_ranks
        if self.lanes is None:
            if self.num_lanes < ranks:
                better = ranks * max(1, round(batch / ranks))
                raise ValueError(
                    f"batch_size: wanted a multiple of some lane count of at least {ranks} ranks, seen {batch}; "
                    f"nearest: {better}"
                )
            return self
        if self.lanes < ranks:
            raise ValueError(f"lanes: wanted at least the {ranks} ranks, seen {self.lanes}")
        if batch % self.lanes:
            better = self.lanes * max(1, round(batch / self.lanes))
            raise ValueError(f"batch_size: wanted a multiple of {self.lanes} lanes, seen {batch}; nearest: {better}")
        return self

    @property
    def num_lanes(self) -> int:
        """C, the lanes of the run."""
        return self.lanes or default_lanes(self.batch_size, self.data_ranks)

    @property
    def data_ranks(self) -> int:
        """Parts into which the ranks split the rows of a batch."""
        return max(1, num_groups(self.strategy, self.ranks))

    @property
    def is_elastic(self) -> bool:
        """Whether no collective joins the ranks, so that one can be lost."""
        return isinstance(self.strategy, Elastic) and self.ranks > 1

    @property
    def lets_lanes_move(self) -> bool:
        """Whether `balance` may move lanes between ranks; of `auto`, what it takes says so."""
        has_own_rows = group_size(self.strategy, self.ranks) == 1
        return has_own_rows and what_is_learned(self.strategy) is None and not isinstance(self.strategy, Auto)

    @property
    def roles(self) -> list[str]:
        """Of ranks that speak to each other by themselves, `server` or `worker`, one each."""
        servers = num_servers(self.strategy)
        return ["server"] * servers + ["worker"] * (self.ranks - servers) if self.is_elastic else []

    @property
    def num_micro_batches(self) -> int:
        """Parts of a rank's batch."""
        if self.micro_batches or not isinstance(self.strategy, PipelineParallel):
            return self.micro_batches or 1
        return max(1, min(PARTS_A_STAGE * group_size(self.strategy, self.ranks), self.batch_size // self.data_ranks))

    def remarks(self, steps: int) -> list[str]:
        """What of these settings has no use, with so many steps an epoch."""
        found, strategy = [], self.strategy
        if self.ranks == 1 and not isinstance(strategy, DataParallel | Auto):
            found.append(f"train.strategy: one rank trains alone, {strategy.name} has no use")
        if self.ranks > 1 and (warmup := warmup_steps(strategy)) >= (total := steps * self.epochs):
            found.append(
                f"train.strategy: all {total:,} steps are in the warm-up of {warmup:,}, which exchanges whole gradients; "
                "lower warmup_steps"
            )
        return found

    def learned(self) -> dict[str, Any]:
        """The settings that say what is learned, however many ranks learn it."""
        settings = self.model_dump(mode="json", exclude=set(HOW_NOT_WHAT)) | {"lanes": self.num_lanes}
        strategy = what_is_learned(self.strategy)
        return settings | ({"strategy": strategy, "ranks": self.ranks} if strategy else {})


def default_lanes(batch_size: int, ranks: int) -> int:
    """The largest divisor of `batch_size` that is at most 16, or the ranks where there are more."""
    limit = min(max(16, ranks), batch_size)
    return max(lanes for lanes in range(1, limit + 1) if batch_size % lanes == 0)
