from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from harness.interface.roles import parameter_roles
from harness.interface.workload import WorkloadSpec
from workloads.data import kjv
from workloads.gpt2 import GPT2, Block, GPT2Model, GPT2Options

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text() -> bytes:
    return kjv.load_text("auto")[1]


@pytest.fixture
def workload(make_spec: Callable[..., WorkloadSpec], text: bytes, monkeypatch: pytest.MonkeyPatch) -> GPT2:
    monkeypatch.setattr(kjv, "load_text", lambda source: (source, text))
    loaded = GPT2(make_spec("gpt2"))
    loaded.load("package", CPU)
    return loaded


# -- Model ------------------------------------------------------------------------------------------------------------


def test_published_size() -> None:
    with torch.device("meta"):
        model = GPT2Model(GPT2Options(vocabulary=50257, context=1024, layers=12, width=768, heads=12, dropout=0.1))
        assert model(torch.zeros(1, 1024, dtype=torch.int64)).shape == (1, 1024, 50257)
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Options(vocabulary=256, context=64, layers=8, width=128, heads=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            ends_a_branch = name.endswith(("project.weight", "contract.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / 4 if ends_a_branch else 0.02, rel=0.05), name


def test_predictions_do_not_see_the_future() -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Options(vocabulary=11, context=8, layers=2, width=12, heads=3)).eval()
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    torch.testing.assert_close(model(tokens[:, :5]), before[:, :5])


def test_block_against_its_equations() -> None:
    torch.manual_seed(0)
    block, x = Block(12, 3, 0.0).double(), torch.randn(2, 8, 12, dtype=torch.float64)
    parts = block.query_key_value(block.attention_norm(x)).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in parts)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    middle = x + block.project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    hidden = block.expand(block.mlp_norm(middle))
    gelu = hidden / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(block(x), middle + block.contract(gelu))


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Options(vocabulary=11, context=8, layers=1, width=12, heads=3, dropout=0.5))
    tokens = torch.randint(11, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_roles(workload: GPT2) -> None:
    roles = parameter_roles(workload.build_model(), workload.role_patterns())
    assert [name for name, role in roles.items() if role == "embedding"] == ["tokens.weight", "positions.weight"]
    assert sum(role == "hidden_matrix" for role in roles.values()) == 4 * workload.model_options.layers
    assert set(roles.values()) == {"embedding", "hidden_matrix", "norm", "bias"}


# -- Data -------------------------------------------------------------------------------------------------------------


def test_batch_is_a_pure_function_of_indices_and_keys(workload: GPT2, keys: Tensor) -> None:
    indices = torch.randint(workload.train_size, (64,), generator=torch.Generator().manual_seed(1))
    batch = workload.batch(indices, keys)
    parts = [workload.batch(i, k) for i, k in zip(indices.split(10), keys.split(10), strict=True)]
    for name in ("inputs", "labels"):
        assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
        assert batch[name].shape == (64, workload.model_options.context)
        assert batch[name].dtype == torch.int64


def test_index_and_key_give_the_start_of_a_window(workload: GPT2, text: bytes) -> None:
    context = workload.model_options.context
    train = kjv.split_text(text, workload.data_options.blocks, {"validation": 4, "test": 9})["train"]
    assert workload.train_size == len(train) // context - 1
    last = workload.train_size - 1
    for index, key in ((0, 0), (3, context + 5), (last, context - 1)):
        batch = workload.batch(torch.tensor([index]), torch.tensor([key]))
        start = index * context + key % context
        assert batch["inputs"][0].tolist() == train[start : start + context].tolist()
        assert batch["labels"][0].tolist() == train[start + 1 : start + context + 1].tolist()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_spans_its_split_in_a_fixed_order(workload: GPT2, text: bytes, split: str) -> None:
    context = workload.model_options.context
    content = kjv.split_text(text, workload.data_options.blocks, {"validation": 4, "test": 9})[split]
    batches = list(workload.evaluation_batches(split))
    part = list(workload.evaluation_batches(split, slice(1, None, 2)))
    assert [batch["inputs"].tolist() for batch in part] == [batch["inputs"].tolist() for batch in batches[1::2]]
    assert sum(len(batch["labels"]) for batch in batches) == workload.data_options.evaluation_examples
    assert batches[0]["inputs"][0].tolist() == content[:context].tolist()
    assert batches[-1]["labels"][-1].tolist() == content[-context:].tolist()
    for batch, again in zip(batches, workload.evaluation_batches(split), strict=True):
        assert torch.equal(batch["inputs"], again["inputs"])
        assert torch.equal(batch["inputs"][:, 1:], batch["labels"][:, :-1])


def test_fingerprint(workload: GPT2) -> None:
    assert workload.fingerprint == {"name": "kjv", "source": "package", "text": kjv.SHA256}


# -- Loss -------------------------------------------------------------------------------------------------------------


def test_losses_agree(workload: GPT2, keys: Tensor) -> None:
    torch.manual_seed(0)
    batch = workload.batch(torch.arange(64), keys)
    outputs = workload.forward(workload.build_model(), batch)
    mean, each = workload.loss(outputs, batch), workload.loss(outputs, batch, reduction="none")
    assert each.shape == (64,)
    torch.testing.assert_close(each.mean(), mean)
    # An untrained model predicts all bytes alike: ln 256 nats per byte.
    assert mean.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.1)
    sums = workload.evaluation_sums(outputs, batch)
    torch.testing.assert_close(sums["loss"] / sums["num_examples"], mean)


def test_sampled_labels_follow_the_prediction(workload: GPT2) -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.7])
    outputs = probabilities.log().expand(100, 200, 3)
    labels = workload.sample_labels(outputs, torch.Generator().manual_seed(0))
    assert labels.shape == (100, 200)
    torch.testing.assert_close(labels.flatten().bincount() / labels.numel(), probabilities, atol=0.015, rtol=0)
    assert torch.equal(labels, workload.sample_labels(outputs, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"width": 50, "heads": 4}}, "width=50 must be a multiple of heads=4"),
        ({"model": {"wdith": 48}}, "wdith"),
        ({"model": {"dropout": 1.0}}, "dropout"),
        ({"data": {"blocks": 9}}, "blocks"),
    ],
)
def test_bad_options_are_named(make_spec: Callable[..., WorkloadSpec], options: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GPT2(make_spec("gpt2", **options))
