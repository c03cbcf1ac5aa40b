"""The caller's model: left unmodified, tracked as it changes, shared between threads."""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from test_adapters import padded_batch, positions_of
from test_runtime import batch_of, mixed_policy, prompts_of, random_heads, runtime_of
from test_spade import naive_spade
from tiny_models import LAYERS, VOCAB, WIDTH, blocks_of, tiny
from torch import nn

from lspade_train import ExitPolicy, ExitRuntime, LSpadeHeads, ModelAdapter, spade_logits
from lspade_train.errors import ArtifactError, TaskError, UnsupportedModelError
from lspade_train.models import adapter as adapter_module
from lspade_train.models import known
from lspade_train.policies.flops import count_flops
from lspade_train.runtime.decide import decide_batch

PROMPT = torch.tensor([1, 5, 9, 23, 7])
LAYER = 2


def spade(model):
    """SPADE's logits at one layer of one prompt."""
    return spade_logits(model, PROMPT[None], layers=[LAYER])[0, 0]


def oracle(model):
    """The same by the model's own two-token forward."""
    with torch.no_grad():
        return naive_spade(model, PROMPT, LAYER)


def attributes(model):
    """Every attribute of every module, with hook tables and weights by content."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in found.items()}
        for found in map(vars, model.modules())
    ]


USES = {
    "spade_logits": lambda model: spade_logits(model, *padded_batch("left")),
    "decide": lambda model: runtime_of(model, ExitPolicy.always(2)).decide(prompts_of()),
    "generate": lambda model: runtime_of(model, ExitPolicy.always(2)).generate(prompts_of(), 3),
    "bind": lambda model: LSpadeHeads([1], WIDTH).bind(model),
    "count_flops": count_flops,
    "identity": lambda model: ModelAdapter.of(model).identity,
}


@pytest.mark.parametrize("use", USES)
def test_using_a_model_leaves_no_trace_on_it(use):
    model = tiny("llama").train()
    before = attributes(model)
    needed = [parameter.requires_grad for parameter in model.parameters()]
    USES[use](model)
    assert attributes(model) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert all(needed)


def test_a_config_that_collects_hidden_states_leaves_no_hooks_on_the_blocks():
    model = tiny("llama")
    model.config.output_hidden_states = True
    spade(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_no_graph_is_built_even_if_the_weights_require_gradients():
    model = tiny("llama")
    heads = LSpadeHeads([LAYER], WIDTH).requires_grad_(False).bind(model)
    hidden = torch.randn(2, WIDTH)
    assert not spade_logits(model, PROMPT[None]).requires_grad
    assert not ModelAdapter.of(model).plan(PROMPT[None]).hidden.requires_grad
    assert not heads.logits(hidden, LAYER).requires_grad


def test_a_head_trained_through_a_model_gets_its_gradient():
    heads = LSpadeHeads([LAYER], WIDTH).bind(tiny("llama"))
    heads.logits(torch.randn(2, WIDTH), LAYER).logsumexp(-1).sum().backward()
    assert heads.bias.grad is not None
    assert heads.bias.grad.abs().max() > 0


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_used_model_can_still_be_copied_and_saved(way):
    model = tiny("llama")
    expected = spade(model)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(spade(twin), expected)


def test_a_used_model_is_freed_even_while_its_hook_is_referenced():
    model = tiny("llama")
    modes = []
    blocks_of(model)[0].register_forward_hook(lambda *_: modes.append(model.training))
    spade(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# A model that changes -------------------------------------------------------------------------


def scale_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def scale_data(model):
    for parameter in blocks_of(model)[3].parameters():
        parameter.data.mul_(0.5)


def step_a_fused_optimizer(model):
    optimizer = torch.optim.AdamW(blocks_of(model)[3].parameters(), lr=0.1, fused=True)
    model(PROMPT[None]).logits.logsumexp(-1).sum().backward()
    optimizer.step()


def load_other_weights(model):
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})


def replace_a_parameter(model):
    mlp = blocks_of(model)[2].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach() * 2)


def replace_the_head(model):
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    model.set_output_embeddings(head)


def replace_a_block(model):
    blocks_of(model)[3] = copy.deepcopy(blocks_of(model)[3])
    scale_data(model)


def hook_a_module(model):
    blocks_of(model)[2].mlp.register_forward_hook(lambda _, __, output: output * 0.5)


def patch_a_forward(model):
    mlp = blocks_of(model)[2].mlp
    forward = mlp.forward
    mlp.forward = lambda hidden: forward(hidden) * 0.5


def change_dtype(model):
    model.to(torch.bfloat16)


class Switched(nn.Module):
    """A linear map with a part that can be switched off, as in adapters."""

    def __init__(self, base):
        super().__init__()
        self.base, self.enabled = base, True

    def forward(self, hidden):
        return self.base(hidden) * (2 if self.enabled else 1)


def flip_a_switch(model):
    blocks_of(model)[2].mlp.gate_proj.enabled = False


CHANGES = [
    scale_in_place, scale_data, step_a_fused_optimizer, load_other_weights, replace_a_parameter,
    replace_the_head, replace_a_block, hook_a_module, patch_a_forward, change_dtype, flip_a_switch,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_answers_with_its_current_weights(change):
    model = tiny("llama")
    mlp = blocks_of(model)[2].mlp
    mlp.gate_proj = Switched(mlp.gate_proj)
    before = spade(model)
    runtime = ExitRuntime(model, random_heads(), policy=ExitPolicy.always(LAYER))
    runtime.decide([PROMPT.tolist()])
    change(model)
    expected = oracle(model)
    close = 1e-5 if expected.dtype == torch.float32 else 0.05
    assert (expected - before).abs().max() > (0.01 if close < 0.01 else 0)
    torch.testing.assert_close(spade(model), expected, rtol=close, atol=close)
    exited = decide_batch(runtime.probe, batch_of([PROMPT.tolist()])).logits[0]
    torch.testing.assert_close(exited, expected, rtol=close, atol=close)


def test_a_change_of_attention_implementation_is_picked_up():
    model, (ids, mask) = tiny("llama"), padded_batch("left")
    before = spade_logits(model, ids, mask)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(spade_logits(model, ids, mask), before, rtol=1e-5, atol=1e-5)


def test_start_tokens_are_cached_separately_under_autocast():
    model = tiny("llama")
    expected = spade(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spade(model)
    assert torch.equal(spade(model), expected)


def test_the_identity_reflects_the_models_current_weights():
    model = tiny("llama")
    adapter = ModelAdapter.of(model)
    before = adapter.identity
    scale_data(model)
    assert adapter.identity["model_weights"] != before["model_weights"]
    assert adapter.identity["unembedding"] == before["unembedding"]


def test_a_runtime_whose_heads_no_longer_match_the_model_raises_an_error():
    model, heads = tiny("llama"), random_heads()
    identity = ModelAdapter.of(model).identity
    heads.metadata = {"base_model": {**identity, "model_id": "some/model"}}
    runtime = ExitRuntime(model, heads, policy=ExitPolicy.always(LAYER))
    runtime.decide(prompts_of())
    replace_the_head(model)
    with pytest.raises(ArtifactError, match="some/model"):
        runtime.decide(prompts_of())


@pytest.mark.parametrize(
    ("family", "rate"),
    [("llama", {"attention_dropout": 0.1}), ("gpt2", {"resid_pdrop": 0.1})],
    ids=["in a function", "in a module"],
)
def test_a_model_with_active_dropout_is_rejected_until_it_is_disabled(family, rate):
    model = tiny(family, **rate)
    runtime = ExitRuntime(model, random_heads(), policy=ExitPolicy.always(LAYER))
    before, answer = spade(model), runtime.decide(prompts_of())
    model.train()
    for use in (spade, lambda _: runtime.decide(prompts_of()), ModelAdapter):
        with pytest.raises(UnsupportedModelError, match=r"Call model\.eval\(\) first"):
            use(model)
    model.eval()
    assert torch.equal(spade(model), before)
    assert runtime.decide(prompts_of()) == answer


def test_gradient_checkpointing_does_not_change_the_results():
    model, prompts = tiny("llama"), prompts_of()
    policy = mixed_policy(model, prompts)
    before, answers = spade(model), runtime_of(model, policy).decide(prompts)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(spade(model), before)
    assert runtime_of(model, policy).decide(prompts) == answers
    assert all(block.gradient_checkpointing for block in blocks_of(model))


def test_lora_adapters_can_be_switched_scaled_and_merged_during_use():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config).eval()
    plain, seen = tiny("llama"), []

    def follow():
        seen.append(spade(model))
        torch.testing.assert_close(seen[-1], oracle(model), rtol=1e-5, atol=1e-5)

    follow()
    with model.disable_adapter():
        torch.testing.assert_close(spade(model), spade(plain), rtol=1e-5, atol=1e-5)
    follow()
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.set_scale("default", 3.0)
    follow()
    model.merge_adapter()
    follow()
    assert torch.equal(seen[0], seen[1])
    assert (seen[2] - seen[1]).abs().max() > 0.01


# Threads --------------------------------------------------------------------------------------


def test_threads_sharing_a_model_get_the_same_numbers_as_alone():
    model, (ids, mask) = tiny("llama"), padded_batch("left")
    prompts = prompts_of()
    runtime = runtime_of(model, mixed_policy(model, prompts))

    def plain():
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits

    def train():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits
        logits[:, -1].logsumexp(-1).sum().backward()
        return logits.detach()

    def decide():
        return torch.tensor([[d.token_id, d.layer, d.entropy] for d in runtime.decide(prompts)])

    def generate():
        return torch.tensor([one.token_ids for one in runtime.generate(prompts, 3)])

    work = [plain, train, decide, decide, generate, lambda: spade_logits(model, ids, mask)]
    expected = [one() for one in work]
    start = Barrier(len(work))

    def wrong(place):
        start.wait()
        return sum(not torch.equal(work[place](), expected[place]) for _ in range(12))

    with ThreadPoolExecutor(len(work)) as pool:
        assert list(pool.map(wrong, range(len(work)))) == [0] * len(work)


def test_concurrent_first_uses_of_a_model_check_it_once(monkeypatch):
    model, proofs = tiny("llama"), []
    check = "lspade_train.models.adapter.check_adapter"
    real = ModelAdapter.check.__globals__["check_adapter"]
    monkeypatch.setattr(check, lambda adapter: (proofs.append(1), real(adapter)))
    start = Barrier(4)

    def first(_):
        start.wait()
        return spade(model)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(first, range(4)))
    assert all(torch.equal(one, found[0]) for one in found)
    assert len(proofs) == 1


def test_each_call_checks_the_model_for_changes_once(monkeypatch):
    runtime = runtime_of(tiny("llama"), ExitPolicy.always(2), tokens_per_batch=8)
    looks, real = [], adapter_module.snapshot
    monkeypatch.setattr(adapter_module, "snapshot", lambda model: looks.append(1) or real(model))
    for calls in (1, 2):
        runtime.decide(prompts_of())  # several batches, each with two plans
        assert len(looks) == calls


# Start tokens ---------------------------------------------------------------------------------


def test_a_bounded_number_of_recently_used_start_tokens_is_cached(monkeypatch):
    monkeypatch.setattr(known, "START_TOKENS", 3)
    model = tiny("llama")
    adapter = ModelAdapter.of(model)
    ids = torch.arange(3, 13)[:, None].repeat(1, 2)
    together = spade_logits(adapter, ids, layers=[1])
    adapter.start_cache(10)
    assert [token for token, _ in adapter.refresh()._starts] == [11, 12, 10]
    alone = torch.cat([spade_logits(adapter, row[None], layers=[1]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_generation_does_not_modify_the_cached_start_tokens():
    model, prompts = tiny("gpt_oss"), prompts_of([6, 5])
    runtime = runtime_of(model, ExitPolicy.always(LAYERS - 1))
    before = spade_logits(model, PROMPT[None])
    model.generation_config.eos_token_id = None
    first, _ = runtime.generate(prompts, 2)
    model.generation_config.eos_token_id = first.token_ids[0]  # the first row ends, the other stays
    found = runtime.generate(prompts, 4)
    assert len(found[0].token_ids) == 1
    assert len(found[1].token_ids) > 1
    assert torch.equal(spade_logits(model, PROMPT[None]), before)


# Ways to hand over a model and its prompts ----------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=lambda wrap: wrap.__name__)
def test_a_wrapped_model_answers_like_the_inner_one(wrap):
    model = tiny("llama")
    expected = spade(model)
    assert torch.equal(spade(wrap(model)), expected)
    decided = [
        ExitRuntime(one, random_heads(), policy=ExitPolicy.always(LAYER)).decide(prompts_of())
        for one in (model, wrap(model))
    ]
    assert decided[0] == decided[1]


def test_an_object_that_is_not_a_transformers_model_raises_a_clear_error():
    with pytest.raises(UnsupportedModelError, match="Got a Linear; expected a decoder-only"):
        spade(nn.Linear(2, 2))


def test_return_dict_false_changes_nothing_where_transformers_supports_it():
    expected, model = spade(tiny("bloom")), tiny("bloom")
    model.config.return_dict = False
    assert torch.equal(spade(model), expected)
    assert ExitRuntime(model, None, policy=ExitPolicy.never()).decide(prompts_of())


def test_return_dict_false_raises_a_clear_error_where_transformers_does_not_support_it():
    model = tiny("llama")
    model.config.return_dict = False
    with pytest.raises(UnsupportedModelError, match=r"Set config\.return_dict = True"):
        spade(model)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_an_attention_mask_of_any_dtype_is_accepted(dtype):
    model, (ids, mask) = tiny("llama"), padded_batch("left")
    assert torch.equal(spade_logits(model, ids, mask.to(dtype)), spade_logits(model, ids, mask))


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        ([[1, VOCAB]], None, r"Token id 64 is outside the model's vocabulary, 0\.\.63"),
        ([[1, -1]], None, "Token id -1 is outside"),
        ([[1, 5]], [[1, 1, 1]], r"attention_mask is \(1, 3\), the prompts are \(1, 2\)"),
        ([[1, 5], [1, 6]], [[1, 1], [0, 0]], "hides every token of a prompt"),
    ],
)
def test_invalid_prompts_raise_a_clear_error(ids, mask, match):
    given = None if mask is None else torch.tensor(mask)
    with pytest.raises(TaskError, match=match):
        spade_logits(tiny("llama"), torch.tensor(ids), given)


def test_a_decoder_with_a_rebound_forward_raises_a_clear_error():
    model = tiny("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(UnsupportedModelError, match="does not run its own blocks"):
        spade(model)


def test_a_hook_that_changes_the_models_logits_is_detected_at_the_next_call():
    model = tiny("llama")
    spade(model)
    model.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits * 2))
    with pytest.raises(UnsupportedModelError, match="norm and head do not give its logits"):
        spade(model)
