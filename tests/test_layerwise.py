"""Losses group by group: the values and gradients of plain autograd over all layers at once."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lspade_train.probes.heads import LSpadeHeads
from lspade_train.training.layerwise import layer_losses

LAYERS, WIDTH, ROWS = 5, 4, 7
FORMS = ["full", "low_rank", "bias"]


def trained(form):
    torch.manual_seed(0)
    heads = LSpadeHeads(range(1, LAYERS + 1), WIDTH, form=form, rank=2).double()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    return heads


def loss_of(heads, hidden, group):
    """A nonlinear loss per layer."""
    return heads(hidden[:, group]).square().exp().log1p().sum(-1).mean(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_losses_and_gradients_equal_autograd_over_all_layers(form, size):
    heads, hidden = trained(form), torch.randn(ROWS, LAYERS, WIDTH, dtype=torch.float64)
    weights = torch.rand(LAYERS, dtype=torch.float64)
    expected = loss_of(heads, hidden, slice(None))
    wanted = torch.autograd.grad((expected * weights).sum(), list(heads.parameters()))

    groups = [slice(first, first + size) for first in range(0, LAYERS, size)]
    got = layer_losses(heads, groups, lambda part, group: loss_of(part, hidden, group))
    (got * weights).sum().backward()
    torch.testing.assert_close(got, expected)
    for parameter, gradient in zip(heads.parameters(), wanted, strict=True):
        assert (parameter.grad - gradient).abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_the_heads_shares_their_memory(form):
    heads, hidden = trained(form), torch.randn(ROWS, LAYERS, WIDTH, dtype=torch.float64)
    part = heads.part(slice(1, 3))
    assert part.layers == (2, 3)
    assert torch.equal(part(hidden[:, 1:3]), heads(hidden)[:, 1:3])
    with torch.no_grad():
        part.bias.add_(1)
    assert torch.equal(part.bias, heads.bias[1:3])


def test_a_groups_memory_is_freed_before_the_next_group():
    heads, hidden = trained("full"), torch.randn(ROWS, LAYERS, WIDTH, dtype=torch.float64)
    alive = []

    def watched(part, group):
        alive.append(sum(state() is not None for state in states))
        translated = part(hidden[:, group])
        states.append(weakref.ref(translated))
        return translated.square().mean((0, 2))

    states = []
    layer_losses(heads, [slice(i, i + 1) for i in range(LAYERS)], watched)
    assert alive == [0] * LAYERS


@pytest.mark.parametrize("form", ["full", "low_rank"])
def test_gradients_of_all_layers_at_once_are_not_copied(form):
    heads, hidden = trained(form), torch.randn(ROWS, LAYERS, WIDTH, dtype=torch.float64)
    shape = {"full": "weight", "low_rank": "up"}[form]
    made = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found = op(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.shape == heads.get_parameter(shape).shape:
                given = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
                made.extend([op] if found.data_ptr() not in given else [])
            return found

    with Allocations():
        losses = layer_losses(heads, [slice(0, LAYERS)], lambda part, s: loss_of(part, hidden, s))
        losses.sum().backward()
    assert len(made) == 1, made
