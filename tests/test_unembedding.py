"""Heads that are more than a weight: shortcuts match the head's own call, or are rejected."""

import pytest
import torch
from test_runtime import prompts_of
from tiny_models import VOCAB, WIDTH, tiny
from torch import nn
from torch.nn.utils import parametrize

from lspade_train import ExitPolicy, ExitRuntime, ModelAdapter
from lspade_train.errors import UnsupportedModelError
from lspade_train.probes.metrics import entropy
from lspade_train.training.losses import distillation
from lspade_train.training.targets import HiddenTarget


class NormsItsInput(nn.Linear):
    def forward(self, states):
        return super().forward(nn.functional.normalize(states, dim=-1))


class NormsItsWeight(nn.Linear):
    def forward(self, states):
        return nn.functional.linear(states, nn.functional.normalize(self.weight, dim=-1))


class Clamps(nn.Linear):
    def forward(self, states):
        return super().forward(states).clamp(-40, 40)


class Wrapped(nn.Module):
    """Wraps a head as an adapter does: the weight is the base's, the call is not."""

    def __init__(self, head):
        super().__init__()
        self.inner, self.added = head, nn.Linear(WIDTH, VOCAB, bias=False)

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, states):
        return self.inner(states) + self.added(states)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def replaced(kind):
    def change(model):
        old, model.lm_head = model.lm_head, kind(WIDTH, VOCAB, bias=False)
        model.lm_head.weight = old.weight

    return change


def wrapped(model):
    model.lm_head = Wrapped(model.lm_head)


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.flip(-1))


def hooked_before(model):
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1),))


def parametrized(model):
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())


NONLINEAR = {
    "normalises its input": replaced(NormsItsInput),
    "normalises its weight": replaced(NormsItsWeight),
    "clamps": replaced(Clamps),
    "wrapped": wrapped,
    "hook": hooked,
    "pre-hook": hooked_before,
}
HEADS = NONLINEAR | {"parametrised": parametrized, "plain": lambda model: None}


def adapter_with(head, **settings):
    model = tiny("llama", **settings)
    HEADS[head](model)
    return ModelAdapter(model)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_logits_of_a_few_tokens_match_the_heads_own_call(head):
    unembed = adapter_with(head).unembed
    hidden = torch.randn(5, WIDTH)
    ids = torch.randint(VOCAB, (5, 3))
    expected = unembed.head(unembed.norm(hidden)).gather(-1, ids)
    torch.testing.assert_close(unembed.tokens(hidden, ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("head", ["normalises its input", "hook"])
def test_a_check_over_the_choices_uses_the_heads_own_logits(head):
    adapter, prompts, choices = adapter_with(head), prompts_of(), [3, 4, 5]
    policy = ExitPolicy.always(2, decoder="logit_lens", scope="choices")
    [found] = ExitRuntime(adapter, None, policy=policy).decide(prompts[:1], choices)
    plan = adapter.plan(torch.tensor(prompts[:1]))
    hidden = adapter.run_block(plan, 1, adapter.run_block(plan, 0, plan.hidden))[0, -1]
    logits = adapter.unembed.head(adapter.unembed.norm(hidden))[choices]
    assert found.layer == 2
    assert found.entropy == pytest.approx(float(entropy(logits)), abs=1e-5)


def loss_of(unembed, student):
    target = HiddenTarget(torch.randn(6, WIDTH, dtype=student.dtype), unembed)
    return distillation(student, target, unembed).loss.sum()


@pytest.mark.parametrize("head", NONLINEAR)
def test_a_loss_whose_gradient_would_be_wrong_is_rejected(head):
    with pytest.raises(UnsupportedModelError, match="fitted through a plain linear one"):
        loss_of(adapter_with(head).unembed, torch.randn(6, WIDTH, requires_grad=True))


def test_the_gradient_through_a_parametrised_head_matches_autograd():
    model = tiny("llama").double()
    parametrized(model)
    unembed = ModelAdapter(model).unembed
    student = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    loss_of(unembed, student).backward()
    torch.manual_seed(1)
    again = student.detach().clone().requires_grad_()
    p_target = unembed(torch.randn(6, WIDTH, dtype=torch.float64)).softmax(-1)
    torch.nn.functional.cross_entropy(unembed(again), p_target, reduction="sum").backward()
    torch.testing.assert_close(student.grad, again.grad)


def test_a_wrapped_heads_extra_parameters_are_part_of_its_digest():
    first, second = (adapter_with("wrapped").unembed for _ in range(2))
    assert first.digest == second.digest
    with torch.no_grad():
        second.head.added.weight[3, 3] += 1
    del second.__dict__["digest"]
    assert first.digest != second.digest


def test_a_head_without_a_weight_is_rejected():
    model = tiny("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModelError, match="Sequential.*has no weight of its own"):
        ModelAdapter(model)


def test_a_head_with_a_packed_weight_is_rejected():
    class Packed(nn.Linear):
        def forward(self, states):
            return super().forward(states).repeat_interleave(2, -1)

    model = tiny("llama")
    replaced(Packed)(model)
    with pytest.raises(UnsupportedModelError, match="gives 128 logits, and its weight has 64 rows"):
        ModelAdapter(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_plain_head_is_linear_in_every_dtype(dtype):
    assert adapter_with("plain", dtype=dtype).unembed.linear
