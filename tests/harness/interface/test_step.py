from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness.interface.model_runner import StepBatch
from harness.interface.needs import Need, UndeclaredNeed
from harness.interface.step import StepContext, swapped
from tests.harness.problem import Net, context, make


def test_backward_gradients_and_loss_agree() -> None:
    evaluator, ctx = make(Need.RE_EVALUATE, Need.LOSS)
    loss = ctx.backward()
    by_backward = [p.grad.clone() for p in evaluator.parameters]  # type: ignore[union-attr]
    again, gradients = ctx.loss_and_gradients()
    assert torch.equal(loss, again)
    assert torch.equal(loss, ctx.loss())
    assert all(torch.equal(a, b) for a, b in zip(by_backward, gradients, strict=True))
    assert evaluator.counters.forward_examples == 48
    assert evaluator.counters.backward_examples == 32


def test_only_the_first_forward_moves_the_buffers() -> None:
    evaluator, ctx = make(Need.RE_EVALUATE, Need.LOSS)
    start = [b.clone() for b in evaluator.buffers]
    ctx.backward()
    after = [b.clone() for b in evaluator.buffers]
    assert not all(torch.equal(a, b) for a, b in zip(start, after, strict=True))
    ctx.gradients()
    ctx.loss()
    assert all(torch.equal(a, b) for a, b in zip(after, evaluator.buffers, strict=True))


def test_micro_batches_give_the_mean_gradient() -> None:
    """Without BatchNorm and dropout the cut changes nothing but rounding, an uneven last piece included."""
    full_evaluator, full_batch = make(Need.RE_EVALUATE, model=Net(0.0, norm=False), examples=14)
    cut_evaluator, cut = make(Need.RE_EVALUATE, micro_batch=4, model=Net(0.0, norm=False), examples=14)
    cut_evaluator.model.load_state_dict(full_evaluator.model.state_dict())
    assert torch.allclose(full_batch.backward(), cut.backward(), rtol=1e-12)
    for a, b, c in zip(full_evaluator.parameters, cut_evaluator.parameters, cut.gradients(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-14)  # type: ignore[arg-type]
        assert torch.allclose(b.grad, c, rtol=1e-10, atol=1e-14)  # type: ignore[arg-type]


def test_buffers_of_micro_batches_are_combined_as_a_mean_of_independent_updates() -> None:
    evaluator, ctx = make(micro_batch=4)
    norm = evaluator.model.norm
    assert isinstance(norm, torch.nn.BatchNorm1d) and norm.running_mean is not None
    inputs = evaluator.model.first(evaluator.workload.batch(torch.arange(16), torch.arange(16))["inputs"])  # type: ignore[operator]
    expected = torch.stack([0.1 * piece.mean(0) for piece in inputs.split(4)]).mean(0)
    ctx.backward()
    assert torch.allclose(norm.running_mean, expected, rtol=1e-10)
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_hessian_vector_product_is_the_derivative_of_the_gradient() -> None:
    evaluator, ctx = make(Need.SECOND_DERIVATIVES, Need.RE_EVALUATE, micro_batch=8)
    torch.manual_seed(3)
    v = [torch.randn_like(p) for p in evaluator.parameters]
    product = ctx.hessian_vector_product(v)
    h = 1e-5
    up = ctx.gradients(params=[p.detach() + h * d for p, d in zip(evaluator.parameters, v, strict=True)])
    down = ctx.gradients(params=[p.detach() - h * d for p, d in zip(evaluator.parameters, v, strict=True)])
    for hv, a, b in zip(product, up, down, strict=True):
        assert torch.allclose(hv, (a - b) / (2 * h), rtol=1e-5, atol=1e-8)
    assert evaluator.counters.backward_examples == 2 * 16 + 2 * 16


def test_a_differentiable_gradient_can_be_differentiated() -> None:
    evaluator, ctx = make(Need.SECOND_DERIVATIVES, model=Net(0.0, norm=False))
    gradients = ctx.gradients(create_graph=True)
    norm = sum((g.square().sum() for g in gradients), torch.zeros(()))
    assert all(p.isfinite().all() for p in torch.autograd.grad(norm, evaluator.parameters))


def test_gradients_elsewhere_leave_the_parameters_alone() -> None:
    evaluator, ctx = make(Need.RE_EVALUATE)
    before = [p.detach().clone() for p in evaluator.parameters]
    gradients = ctx.gradients()
    shifted_gradients = ctx.gradients(params=[p + 0.1 for p in before])
    assert not torch.equal(gradients[0], shifted_gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(before, evaluator.parameters, strict=True))


def test_sampled_labels_come_from_the_models_predictions() -> None:
    """The expectation of the gradient on sampled labels is zero; that on the true labels is not."""
    _, ctx = make(Need.SAMPLED_LABELS, Need.RE_EVALUATE, model=Net(0.0, norm=False))
    draws = torch.stack([ctx.gradients(labels="sampled")[-1] for _ in range(3000)])
    true = ctx.gradients()[-1]
    error = draws.std(0) / 3000**0.5
    assert (draws.mean(0).abs() < 4 * error).all()
    assert (true.abs() > 4 * error).any()


def test_micro_batch_gradients_average_to_the_gradient() -> None:
    _, ctx = make(Need.MICRO_BATCH_GRADIENTS, Need.RE_EVALUATE, micro_batch=4)
    pieces = ctx.micro_batch_gradients()
    assert len(pieces) == 4
    for k, (parameter, gradient) in enumerate(zip(ctx.parameters, ctx.gradients(), strict=True)):
        assert torch.allclose(torch.stack([piece[k] for piece in pieces]).mean(0), gradient, rtol=1e-10, atol=1e-14)
        assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_micro_batches_can_be_cut_finer_than_the_workloads() -> None:
    evaluator, ctx = make(Need.MICRO_BATCH_GRADIENTS, Need.RE_EVALUATE, model=Net(0.0, norm=False))
    pieces = ctx.micro_batch_gradients(at_least=8)
    assert len(pieces) == 8
    for k, gradient in enumerate(ctx.gradients()):
        assert torch.allclose(torch.stack([piece[k] for piece in pieces]).mean(0), gradient, rtol=1e-10, atol=1e-14)
    assert evaluator.counters.forward_examples == 32
    _, few = make(Need.MICRO_BATCH_GRADIENTS, model=Net(norm=False), examples=3)
    assert len(few.micro_batch_gradients(at_least=8)) == 3
    _, enough = make(Need.MICRO_BATCH_GRADIENTS, micro_batch=4)
    assert len(enough.micro_batch_gradients(at_least=2)) == 4


def test_finer_micro_batches_twice_in_a_step_hold_every_example() -> None:
    _, ctx = make(Need.MICRO_BATCH_GRADIENTS, Need.RE_EVALUATE, micro_batch=8, model=Net(0.0, norm=False))
    gradients = ctx.gradients()
    for at_least, counted in ((6, 6), (18, 16), (2, 16)):
        assert len(ctx.micro_batch_gradients(at_least=at_least)) == counted
        for parameter, gradient in zip(ctx.parameters, gradients, strict=True):
            assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_the_terms_of_the_mean_loss_are_counted() -> None:
    evaluator, ctx = make(micro_batch=4)
    assert ctx.label_count == ctx.batch_size == 16
    tokens = {"inputs": torch.zeros(4, 5), "labels": torch.zeros(4, 9, dtype=torch.int64)}  # as in language modelling
    mixed = tokens | {"labels": torch.zeros(4, 3)}  # mixtures of three classes
    for batch, terms in ((tokens, 54), (mixed, 6)):
        full_batch = StepBatch({0: batch}, shares=(2,), micro=4, size=6)
        assert StepContext(evaluator, full_batch, 0, frozenset(), "test").label_count == terms


def test_dropout_repeats_within_a_step_and_changes_between_steps() -> None:
    evaluator, ctx = make(Need.LOSS, Need.RE_EVALUATE)
    first = ctx.loss()
    assert torch.equal(first, ctx.loss())
    evaluator.counters.update_steps += 1
    evaluator.model.norm.reset_running_stats()  # type: ignore[operator]
    assert not torch.equal(first, context(evaluator, Need.LOSS).loss())


@pytest.mark.parametrize(
    "ask",
    [
        lambda ctx: ctx.loss(),
        lambda ctx: ctx.gradients(labels="sampled"),
        lambda ctx: ctx.gradients(create_graph=True),
        lambda ctx: ctx.hessian_vector_product([]),
        lambda ctx: ctx.micro_batch_gradients(),
        lambda ctx: (ctx.backward(), ctx.backward()),
    ],
)
def test_undeclared_capabilities_raise(ask) -> None:  # type: ignore[no-untyped-def]
    _, ctx = make()
    with pytest.raises(UndeclaredNeed, match="add Need"):
        ask(ctx)


def test_swapped_restores_to_the_bit_even_after_an_exception() -> None:
    parameter = torch.nn.Parameter(torch.tensor([0.1, 1e-30, -0.0]))
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError), swapped([parameter], [torch.ones(3)]):
        assert F.l1_loss(parameter, torch.ones(3)) == 0
        raise RuntimeError
    assert parameter.detach().numpy().tobytes() == before.numpy().tobytes()
