"""Each network takes the contract's inputs, learns, and serves what it was trained to."""

import numpy as np
import pytest
import torch

from pipelines.config.learning import Model
from pipelines.errors import ConfigError
from pipelines.lake import Column, Contract, LabelSpec
from pipelines.models.build import Served, build_network, row_scores, summed_loss
from pipelines.models.inputs import InputLayer, scaled
from pipelines.train.worker import example_inputs
from tests.tables import BINARY, DENSE, IDS, IMAGE, SEQUENCE, SPARSE, contract_of, rated

MULTI = LabelSpec(kind="multiclass", column="y", classes=("a", "b", "c"))
REAL = LabelSpec(kind="real", column="y", mean=10.0, std=4.0)
COUNT = LabelSpec(kind="count", column="y", mean=3.0)
MULTILABEL = LabelSpec(kind="multilabel", column="y", classes=("a", "b", "c"))
MIXED = (DENSE, IDS, *SPARSE, SEQUENCE, IMAGE)


def random_inputs(contract: Contract, rows: int) -> list[torch.Tensor]:
    generator = np.random.default_rng(0)
    found = []
    for column in contract.inputs:
        if column.kind in ("ids", "sparse_ids", "sequence"):
            high = min(column.sizes)
            found.append(torch.from_numpy(generator.integers(0, high, (rows, *column.shape))))
        elif column.kind == "image":
            found.append(torch.from_numpy(generator.integers(0, 256, (rows, *column.shape), dtype=np.uint8)))
        else:
            found.append(torch.from_numpy(generator.normal(size=(rows, *column.shape)).astype(np.float32)))
    return found


def labels_of(label: LabelSpec, rows: int) -> torch.Tensor:
    if label.is_number:
        return (
            torch.randn(rows).double() * 4 + 10
            if label.kind == "real"
            else torch.poisson(torch.full((rows,), 3.0)).double()
        )
    if label.kind == "multilabel":
        return (torch.rand(rows, len(label.classes)) < 0.2).to(torch.int8)
    return torch.randint(0, len(label.classes), (rows,))


def scaled_inputs(contract: Contract, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [scaled(column, tensor) for column, tensor in zip(contract.inputs, tensors, strict=True)]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ({"network": "softmax"}, MIXED),
        ({"network": "mlp", "hidden": [8, 4], "dropout": 0.1, "embedding_dim": 3}, MIXED),
        (
            {"network": "deep_and_cross", "hidden": [8], "cross_layers": 3, "embedding_dim": 2, "embedding_std": 0.1},
            MIXED,
        ),
        ({"network": "dlrm", "hidden": [8], "bottom": [6], "embedding_dim": 2, "dropout": 0.1}, MIXED),
        ({"network": "cnn", "channels": [4, 8], "hidden": 6}, (IMAGE,)),
        ({"network": "cnn", "channels": [4]}, (IMAGE.model_copy(update={"shape": (4, 4, 3)}),)),
        ({"network": "tests.networks:Double"}, (DENSE,)),
    ],
)
@pytest.mark.parametrize("label", [MULTI, REAL, BINARY, COUNT, MULTILABEL])
def test_a_network_learns_and_exports(model: dict[str, object], inputs: tuple[Column, ...], label: LabelSpec) -> None:
    torch.manual_seed(0)
    contract = contract_of(*inputs, label=label)
    network = build_network(Model.model_validate(model), contract)
    tensors = random_inputs(contract, 32)
    target = labels_of(label, 32)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = summed_loss(network(*scaled_inputs(contract, tensors)), target, label)
        assert loss.shape == ()
        optimizer.zero_grad()
        (loss / 32).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2 * abs(losses[0])
    served = Served(network, contract).eval()
    outputs = served(*tensors)
    if label.is_number:
        mean = float(target.mean())
        assert outputs.shape == (32, 1) and 0 < float(outputs.detach().mean()) < 2 * mean, "in the label's units"
    else:
        assert outputs.shape == (32, len(label.classes))
        if label.kind != "multilabel":
            torch.testing.assert_close(outputs.sum(1).float(), torch.ones(32))
    assert row_scores(network(*scaled_inputs(contract, tensors)), target, label).shape == (32,)
    examples = tuple(torch.from_numpy(array) for array in example_inputs(contract).values())
    dynamic = [{0: torch.export.Dim.AUTO} for _ in examples]
    exported = torch.export.export(served, examples, dynamic_shapes=dynamic).module()
    torch.testing.assert_close(exported(*tensors), outputs)


@pytest.mark.parametrize("label", [MULTI, BINARY])
def test_a_row_counts_what_its_class_weighs(label: LabelSpec) -> None:
    outputs, target = torch.randn(32, label.num_outputs), torch.randint(0, len(label.classes), (32,))
    weights = torch.tensor([0.5, 2.0, 3.0][: len(label.classes)], dtype=torch.float64)
    rows = [summed_loss(outputs[i : i + 1], target[i : i + 1], label) * weights[target[i]] for i in range(32)]
    torch.testing.assert_close(summed_loss(outputs, target, label, weights=weights), torch.stack(rows).sum().float())


def test_ids_of_each_column_have_embeddings_of_their_own() -> None:
    layer = InputLayer(contract_of(IDS), embedding_dim=4)
    same = layer(torch.tensor([[1, 1]]))[0]
    assert layer.tables["ids"].num_embeddings == sum(IDS.sizes)
    assert not torch.equal(same[:4], same[4:])


def test_padding_of_sparse_inputs_adds_nothing() -> None:
    layer = InputLayer(contract_of(*SPARSE), embedding_dim=4)
    short = layer(torch.tensor([[2, 5]]), torch.tensor([[1.0, -2.0]]))
    padded = layer(torch.tensor([[2, 5, 0, 0]]), torch.tensor([[1.0, -2.0, 0.0, 0.0]]))
    torch.testing.assert_close(short, padded)


def test_padding_does_not_count_in_a_sequence() -> None:
    layer = InputLayer(contract_of(SEQUENCE), embedding_dim=3)
    table = layer.tables["places"].weight
    found = layer(torch.tensor([[2, 5, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]))
    torch.testing.assert_close(found, torch.stack([(table[2] + table[5]) / 2, torch.zeros(3), table[1]]))


def test_images_are_scaled_in_torch() -> None:
    pixels = torch.tensor([[0, 255]], dtype=torch.uint8)
    floats = scaled(IMAGE, pixels)
    torch.testing.assert_close(floats, torch.tensor([[-1.0, 1.0]]))
    assert scaled(IMAGE, floats) is floats and scaled(DENSE, pixels) is pixels


@pytest.mark.parametrize("temperature", [None, 0.2])
def test_two_towers_tell_a_rows_item_from_those_of_its_lane(temperature: float | None) -> None:
    """The loss by its formula, row by row."""
    torch.manual_seed(0)
    contract = rated()
    network = build_network(Model(network="tests.networks:DoubleTowers", temperature=temperature), contract)
    users, items = torch.randint(0, 7, (9, 1)), torch.tensor([[1], [2], [1], [3], [4], [8], [0], [5], [8]])
    outputs = network(users, items)
    user, item = outputs[:, 1:5], outputs[:, 5:]
    torch.testing.assert_close(outputs[:, 0], (user * item).sum(1))
    counts = torch.tensor(contract.recommended.item_counts).double().clamp(min=1)  # type: ignore[union-attr]
    share = counts / counts.sum()
    wanted = torch.zeros((), dtype=torch.float64)
    for lane in (range(4), range(4, 9)):
        for i in lane:
            among = [j for j in lane if j == i or items[j] != items[i]]
            corrected = torch.stack([torch.exp(user[i] @ item[j]) / share[items[j, 0]] for j in among])
            wanted -= torch.log(corrected[among.index(i)] / corrected.sum())
    torch.testing.assert_close(network.summed_loss(outputs, [users, items], (4, 0, 5)), wanted)


def test_two_towers_take_other_inputs_and_serve_affinities_and_vectors() -> None:
    contract = rated(DENSE, *SPARSE)
    model = Model.model_validate({"network": "two_tower", "width": 3, "user": ["dense"], "item": ["words"]})
    network = build_network(model, contract)
    tensors = random_inputs(contract, 5)
    served = Served(network, contract).eval()
    outputs = served(*tensors)
    assert outputs.shape == (5, 7)
    examples = tuple(torch.from_numpy(array) for array in example_inputs(contract).values())
    exported = torch.export.export(served, examples, dynamic_shapes=[{0: torch.export.Dim.AUTO} for _ in examples])
    torch.testing.assert_close(exported.module()(*tensors), outputs)
    other = [*tensors[:2], tensors[2] + 1, *tensors[3:]]
    moved = served(*other)
    assert not torch.equal(moved[:, 1:4], outputs[:, 1:4]) and torch.equal(moved[:, 4:], outputs[:, 4:])


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="two_tower: wanted the section `recommend`"):
        build_network(Model(network="two_tower"), contract_of(IDS))
    with pytest.raises(ConfigError, match="wanted an input among user, item, seen 'age'"):
        build_network(Model.model_validate({"network": "two_tower", "user": ["age"]}), rated())
    with pytest.raises(ConfigError, match=r"wanted an input in one tower, seen \['item'\] in both"):
        build_network(Model.model_validate({"network": "two_tower", "user": ["item"]}), rated())
    with pytest.raises(ConfigError, match="cnn takes one image input, seen"):
        build_network(Model(network="cnn"), contract_of(DENSE))
    with pytest.raises(ConfigError, match="dlrm takes numbers and ids, seen"):
        build_network(Model(network="dlrm"), contract_of(DENSE))
    with pytest.raises(ConfigError, match="cannot be halved 3 times"):
        build_network(Model.model_validate({"network": "cnn", "channels": [1, 2, 3]}), contract_of(IMAGE))
    with pytest.raises(ConfigError, match="wanted a class at nowhere:Net"):
        build_network(Model(network="nowhere:Net"), contract_of(DENSE))
