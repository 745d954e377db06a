"""The decoder: what comes later changes nothing, heads may be dealt to ranks, and a row's loss is that of its tokens."""

import math

import pytest
import torch
from torch import nn

from pipelines.config.learning import Model
from pipelines.errors import ConfigError
from pipelines.lake import Column, Contract, LabelSpec
from pipelines.models.build import Served, build_network, row_scores, summed_loss, token_hits, token_losses
from pipelines.models.gpt import GPT, Attention
from pipelines.models.sample import sample
from pipelines.train.worker import example_inputs
from tests.tables import BINARY, SEQUENCE, contract_of

T = 8
IDS = Column(name="ids", kind="sequence", dtype="int64", shape=(T + 1,), sizes=(7,))
SPEC = LabelSpec(kind="next_token", column="text", classes=("", "\ufffd", *"abcde"))
CONTRACT = Contract(columns=(Column(name="row_id", kind="row_id", dtype="int64"), IDS), label=SPEC)
MODEL = Model.model_validate({"network": "gpt", "layers": 2, "heads": 2, "width": 16})


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(MODEL, CONTRACT).eval()


def test_a_later_token_changes_no_logits_before_it() -> None:
    decoder, ids = network(), torch.randint(2, 7, (3, T + 1))
    logits = decoder(ids)
    assert logits.shape == (3, T, 7)
    for place in range(T + 1):
        other = ids.clone()
        other[:, place] = (other[:, place] - 1) % 5 + 2
        same = (decoder(other) == logits).all(dim=2).all(dim=0)
        assert same[:place].all() and not same[place:].any(), place


def test_it_is_a_chain_of_layers() -> None:
    decoder, ids = network(), torch.randint(2, 7, (3, T + 1))
    assert isinstance(decoder, GPT)
    torch.testing.assert_close(nn.Sequential(*decoder.layers_in_order())(ids), decoder(ids))


def test_half_of_the_heads_on_each_of_two_ranks_are_all_of_them() -> None:
    torch.manual_seed(0)
    whole, halves, x = Attention(16, 4, 0.0), [Attention(16, 4, 0.0) for _ in range(2)], torch.randn(3, T, 16)
    for rank, half in enumerate(halves):
        mine = slice(8 * rank, 8 * rank + 8)
        for name in "qkv":
            getattr(half, name).weight = nn.Parameter(getattr(whole, name).weight[mine])
        half.proj.weight = nn.Parameter(whole.proj.weight[:, mine])
    torch.testing.assert_close(halves[0](x) + halves[1](x), whole(x))


def test_a_row_counts_by_the_mean_of_its_tokens_without_padding() -> None:
    ids = torch.tensor([[2, 3, 4, 0], [5, 6, 0, 0], [2, 0, 0, 0]])
    logits = torch.randn(3, 3, 7)
    shares = torch.softmax(logits, dim=2)
    wanted = torch.stack(
        [-(shares[0, 0, 3].log() + shares[0, 1, 4].log()) / 2, -shares[1, 0, 6].log(), torch.tensor(0.0)]
    )
    torch.testing.assert_close(token_losses(logits, ids), wanted)
    torch.testing.assert_close(summed_loss(logits, ids, SPEC), wanted.sum())
    right = [[logits[0, 0].argmax() == 3, logits[0, 1].argmax() == 4], [logits[1, 0].argmax() == 6], [False]]
    torch.testing.assert_close(
        token_hits(logits, ids), torch.tensor([sum(map(float, row)) / len(row) for row in right])
    )
    assert torch.equal(row_scores(logits, ids, SPEC), token_hits(logits, ids))


def test_it_learns_serves_what_follows_and_writes() -> None:
    decoder = network().train()
    ids = torch.tensor([[2 + (place + row) % 3 for place in range(T + 1)] for row in range(3)])  # abcabc...
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = summed_loss(decoder(ids), ids, SPEC) / 3
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 < math.log(5)
    served = Served(decoder, CONTRACT).eval()
    short = ids.clone()
    short[:, 5:] = 0
    single = torch.tensor([[3] + [0] * T])
    outputs = served(torch.cat([ids, short]))
    assert outputs.shape == (6, 2 + 7)
    torch.testing.assert_close(outputs[:, 2:].sum(1), torch.ones(6))
    assert outputs[:, 2:].argmax(1).tolist() == [2 + (9 + r) % 3 for r in range(3)] + [
        2 + (5 + r) % 3 for r in range(3)
    ]
    assert (outputs[:, 0] < 0.1).all() and (outputs[:, 1] == 1).all()
    (example,) = example_inputs(CONTRACT).values()
    free = ({0: torch.export.Dim.AUTO},)
    assert served(single)[0, 2:].argmax() == 4 and served(single)[0, 0] == 0
    exported = torch.export.export(served, (torch.from_numpy(example),), dynamic_shapes=free).module()
    torch.testing.assert_close(exported(ids), served(ids))
    text = "".join(sample(decoder.eval(), CONTRACT, num=30, seed=1))
    assert text == "abc" * 10 == "".join(sample(decoder, CONTRACT, num=30, seed=2, temperature=0.5))


@pytest.mark.parametrize(
    ("contract", "params", "message"),
    [
        (CONTRACT, {"heads": 3}, "width: wanted a multiple of 3 heads, seen 16"),
        (contract_of(SEQUENCE, label=BINARY), {}, "wanted a label of kind next_token, seen binary"),
    ],
)
def test_what_it_does_not_take(contract: Contract, params: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_network(Model.model_validate({"network": "gpt", "width": 16, **params}), contract)
