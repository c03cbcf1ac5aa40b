"""The chunked distillation loss against plain float64 autograd."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, WIDTH, tiny
from torch.nn.functional import cross_entropy

from lspade_train.models import ModelAdapter, Unembedding
from lspade_train.training import tiles
from lspade_train.training.losses import cross_entropy as training_loss
from lspade_train.training.losses import distillation
from lspade_train.training.numerics import chunk_memory
from lspade_train.training.targets import (
    HiddenTarget,
    StoredLogits,
    TopkTarget,
    is_reducible,
    reduce_target,
)


def double(family="llama"):
    return ModelAdapter(tiny(family).double()).unembed


def naive(student, goal_logits, unembed):
    """Materialise everything and use autograd."""
    logits = unembed(student)
    goal = goal_logits.softmax(-1)
    loss = -(goal * logits.log_softmax(-1)).sum(-1)
    entropy = -(goal * goal_logits.log_softmax(-1)).sum(-1)
    return loss, loss - entropy, logits.argmax(-1) == goal_logits.argmax(-1)


# gemma2 soft-caps its logits, opt projects and has a LayerNorm with bias, gpt_neox a plain one.
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 64])
def test_loss_and_gradient_equal_float64_autograd(family, chunk_rows):
    unembed = double(family)
    student = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(12, WIDTH, dtype=torch.float64)
    weights = torch.rand(12, dtype=torch.float64)

    loss, kl, agrees = naive(student, unembed(goal), unembed)
    (loss * weights).sum().backward()
    expected, student.grad = student.grad, None

    memory = chunk_memory(unembed, chunk_rows)
    got = distillation(student, HiddenTarget(goal, unembed), unembed, memory=lambda: memory)
    (got.loss * weights).sum().backward()
    assert (student.grad - expected).abs().max() < 1e-9
    torch.testing.assert_close(got.loss, loss)
    torch.testing.assert_close(got.kl, kl, atol=1e-9, rtol=1e-7)
    assert torch.equal(got.agrees, agrees)


# phi's head has a bias.
@pytest.mark.parametrize("family", ["llama", "phi", "opt"])
@pytest.mark.parametrize("tile", [(1, 1), (5, 7), (512, 4096)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_reduced_target_gives_the_float64_loss_and_gradient(family, tile, scale, monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", tile)
    unembed = replace(double(family), scale=scale)
    if family == "phi":
        torch.nn.init.normal_(unembed.bias)
    student = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(12, WIDTH, dtype=torch.float64)
    weights = torch.rand(12, dtype=torch.float64)
    loss, kl, agrees = naive(student, unembed(goal), unembed)
    (loss * weights).sum().backward()
    expected, student.grad = student.grad, None

    memory = chunk_memory(unembed)
    target = reduce_target(HiddenTarget(goal, unembed), 12, unembed)
    got = distillation(student, target, unembed, memory=lambda: memory)
    (got.loss * weights).sum().backward()
    assert (student.grad - expected).abs().max() < 1e-9
    torch.testing.assert_close(got.loss, loss)
    torch.testing.assert_close(got.kl, kl, atol=1e-9, rtol=1e-7)
    assert torch.equal(got.agrees, agrees)


@pytest.mark.parametrize("tile", [(2, 1), (4, 9), (512, 4096)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_softmax_in_tiles_equals_the_whole_softmax(tile, size, monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", tile)
    unembed = double("phi")
    torch.nn.init.normal_(unembed.bias)
    normed = torch.randn(6, WIDTH, dtype=torch.float64) * size
    token_ids = torch.randint(VOCAB, (6, 3))
    logits = torch.nn.functional.linear(normed, unembed.weight, unembed.bias)
    p = logits.softmax(-1)
    found = tiles.softmax_of(unembed, normed, token_ids=token_ids)
    torch.testing.assert_close(found.log_z, logits.logsumexp(-1))
    torch.testing.assert_close(found.mean, p @ unembed.weight)
    torch.testing.assert_close(found.offset, p @ unembed.bias)
    assert torch.equal(found.best, logits.argmax(-1))
    torch.testing.assert_close(found.token_logits, logits.gather(-1, token_ids))
    none = tiles.softmax_of(unembed, normed, mean=False)
    assert none.mean is None
    assert none.token_logits is None
    torch.testing.assert_close(none.log_z, found.log_z)


@pytest.mark.parametrize("stored", ["logits", "topk"])
def test_reducing_stored_logits_keeps_loss_and_kl(stored):
    unembed = double("phi")
    student, logits = (torch.randn(9, size, dtype=torch.float64) for size in (WIDTH, VOCAB))
    values, tokens = logits.topk(5)
    kinds = {"logits": StoredLogits(logits), "topk": TopkTarget(values, tokens, VOCAB)}
    memory = chunk_memory(unembed, 4)
    reduced = reduce_target(kinds[stored], 9, unembed, memory)
    got, expected = (distillation(student, it, unembed) for it in (reduced, kinds[stored]))
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.kl, expected.kl)
    assert torch.equal(got.agrees, expected.agrees)


def test_only_full_precision_linear_logits_are_reduced():
    assert is_reducible(double("llama"))
    assert not is_reducible(double("gemma2"))  # soft-capped
    assert not is_reducible(ModelAdapter(tiny("llama").bfloat16()).unembed)


def test_autocast_leaves_no_gradient_at_a_target_that_was_reduced_outside_of_it():
    head = torch.nn.Linear(64, 512, bias=False)
    unembed = Unembedding(torch.nn.RMSNorm(64, eps=1e-6), head)
    goal = 8 * torch.randn(32, 64)
    target = reduce_target(HiddenTarget(goal, unembed), 32, unembed)
    student = goal.clone().requires_grad_(True)
    far = (goal + 0.1).requires_grad_(True)
    for states in (student, far):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = training_loss(states, target, unembed)
        loss.sum().backward()
    assert student.grad.norm() < 1e-4 * far.grad.norm()


LIMITS = {torch.float16: 0.02, torch.bfloat16: 0.02, torch.float32: 1e-5}
"""Relative error of the loss's gradient by a head's weight."""


def gradients(dtype, rows, vocab=2048, width=32):
    """dL/dA of a head 2% from its target: ours, by kind of target, and the float64 one."""
    head = torch.nn.Linear(width, vocab, bias=False, dtype=dtype).requires_grad_(False)
    norm = torch.nn.RMSNorm(width, eps=1e-6, dtype=dtype).requires_grad_(False)
    unembed = Unembedding(norm, head)
    hidden = torch.randn(rows, width).to(dtype)
    goal = (hidden + 0.02 * torch.randn(rows, width)).to(dtype)
    exact = Unembedding(
        torch.nn.RMSNorm(width, eps=1e-6, dtype=torch.float64), copy.deepcopy(head).double()
    )
    weight = torch.zeros(width, width, dtype=torch.float64, requires_grad=True)
    wide = hidden.double()
    naive(wide + wide @ weight, exact(goal.double()), exact)[0].mean().backward()

    target, memory = HiddenTarget(goal, unembed), chunk_memory(unembed)
    targets = {"logits": target}
    if is_reducible(unembed):
        targets["reduced"] = reduce_target(target, rows, unembed)
    found = {}
    for name, kind in targets.items():
        ours = torch.zeros(width, width, requires_grad=True)
        states = hidden.float()
        loss = training_loss(states + states @ ours, kind, unembed, memory=lambda: memory)
        loss.mean().backward()
        found[name] = ours.grad.double()
    return found, weight.grad


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("rows", [64, 256, 1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_gradients_match_float64_for_any_dtype_and_batch_size(dtype, rows):
    found, expected = gradients(dtype, rows)
    for name, gradient in found.items():
        error = (gradient - expected).norm() / expected.norm()
        assert error < LIMITS[dtype], name


def test_a_scaled_head_has_a_scaled_gradient():
    unembed = replace(double(), scale=0.25)
    student = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(4, VOCAB, dtype=torch.float64)
    naive(student, goal, unembed)[0].sum().backward()
    expected, student.grad = student.grad, None
    distillation(student, StoredLogits(goal), unembed).loss.sum().backward()
    assert (student.grad - expected).abs().max() < 1e-9


def test_gradcheck_of_the_full_loss():
    # Llama's norm computes in float32, too coarse for finite differences.
    unembed = double("gpt_neox")
    goal = torch.randn(3, VOCAB, dtype=torch.float64)
    student = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: distillation(x, StoredLogits(goal), unembed).loss, (student,)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, VOCAB), st.integers(1, 9), st.floats(0.1, 30))
def test_a_top_k_target_is_the_renormalised_distribution(k, rows, sharpness):
    unembed = double()
    logits = torch.randn(rows, VOCAB, dtype=torch.float64) * sharpness
    student = torch.randn(rows, WIDTH, dtype=torch.float64)
    values, tokens = logits.topk(k)
    dense = torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)
    expected = cross_entropy(unembed(student), dense.softmax(-1), reduction="none")
    got = distillation(student, TopkTarget(values, tokens, VOCAB), unembed)
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=1e-5)


def test_a_target_equal_to_the_student_has_no_kl_and_no_gradient():
    unembed = double()
    student = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    got = distillation(student, HiddenTarget(student.detach(), unembed), unembed)
    got.loss.sum().backward()
    assert got.kl.abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12
    assert got.agrees.all()


def test_requested_tokens_are_returned_with_their_logits():
    unembed = double()
    student = torch.randn(5, WIDTH, dtype=torch.float64)
    token_ids = torch.randint(VOCAB, (5, 3))
    got = distillation(student, HiddenTarget(student, unembed), unembed, token_ids=token_ids)
    torch.testing.assert_close(got.token_logits, unembed(student).gather(-1, token_ids))


# opt and gpt_neox have a LayerNorm, which rejects states in another precision.
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_give_a_full_precision_loss(family, dtype):
    unembed = ModelAdapter(tiny(family).to(dtype), check=False).unembed
    student = torch.randn(8, WIDTH, requires_grad=True)
    goal = torch.randn(8, WIDTH).to(dtype)
    got = distillation(student, HiddenTarget(goal, unembed), unembed)
    got.loss.mean().backward()
    assert got.loss.dtype == torch.float32
    assert student.grad.dtype == torch.float32
    assert torch.isfinite(student.grad).all()


def test_buffers_allocated_during_validation_are_reused_in_training():
    unembed = double()
    with torch.inference_mode():
        memory = chunk_memory(unembed)
    student = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    goal = HiddenTarget(torch.randn(4, WIDTH, dtype=torch.float64), unembed)
    distillation(student, goal, unembed, memory=lambda: memory).loss.sum().backward()
    assert student.grad is not None
