"""The LM Evaluation Harness: requests and tasks, with and without exits, against its `hf` model."""

import json
import random
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from toy import WORDS
from transformers import PreTrainedTokenizerFast

from lspade_train import ExitPolicy, LSpadeHeads, ModelAdapter, spade_logits
from lspade_train.cli import main
from lspade_train.errors import ArtifactError, PolicyError
from lspade_train.integrations.lm_eval import LSpadeLM
from lspade_train.policies.flops import count_flops, exit_flops

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT / "recipes/quickstart/lm_eval"
LAYER = 2


@pytest.fixture(scope="module")
def model(toy_root):
    """A folder with a random Llama and its tokenizer."""
    return str(toy_root / "model")


@pytest.fixture(scope="module")
def hf(model):
    return HFLM(pretrained=model, device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def heads(model, tmp_path_factory) -> Path:
    """A folder with heads for that model, slightly off the identity."""
    folder = tmp_path_factory.mktemp("heads")
    adapter = ModelAdapter.from_pretrained(model)
    heads = LSpadeHeads([1, 2, 3], adapter.hidden_size)
    torch.nn.init.normal_(heads.weight, std=0.02)
    heads.metadata = {"base_model": {"model_id": model, **adapter.identity}, "training": {}}
    heads.save_pretrained(folder)
    return folder


@pytest.fixture
def lspade(model, heads, tmp_path):
    """Builds the model with a policy."""

    def build(policy: ExitPolicy) -> LSpadeLM:
        policy.save(tmp_path)
        return LSpadeLM(
            pretrained=model, heads=str(heads), policy=str(tmp_path), device="cpu", batch_size=4
        )

    return build


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, a, n, (None, None, None)) for n, a in enumerate(arguments)]


def questions(count=12, choices=("A", "B", "C")) -> list[Instance]:
    """Contexts of mixed lengths with all choices of each, shuffled."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[:-1], k=draw.randint(1, 20))) for _ in range(count)]
    pairs = [(f"{text} ? :", f" {choice}") for text in texts for choice in choices]
    draw.shuffle(pairs)
    return asked("loglikelihood", *pairs)


def test_without_exits_every_request_type_matches_the_hf_model(model, hf):
    never = LSpadeLM(pretrained=model, policy="never", device="cpu", batch_size=4)
    texts = asked("loglikelihood_rolling", *[(r.args[0],) for r in questions(3)])
    prompts = asked("generate_until", *[(r.args[0], {"max_gen_toks": 4}) for r in questions(2)])
    for requests in (questions(), questions(4, ("A B", "C"))):
        expected = hf.loglikelihood(requests, disable_tqdm=True)
        assert never.loglikelihood(requests, disable_tqdm=True) == expected
    assert never.loglikelihood_rolling(texts, True) == hf.loglikelihood_rolling(texts, True)
    assert never.generate_until(prompts, True) == hf.generate_until(prompts, True)
    assert never.get_model_info()["lspade"] == {
        "questions": 0,
        "white_space_read_as_prompt": 0,
        "full_model_requests": {
            "continuations": 36 + 8,
            "rolling windows": len(texts),
            "generated texts": len(prompts),
        },
    }


@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
def test_checks_without_an_exit_give_the_full_models_likelihoods(lspade, hf, scope):
    checking = lspade(ExitPolicy(layers=(1, 2, 3), threshold=0.0, scope=scope))
    requests = questions()
    found = checking.loglikelihood(requests, disable_tqdm=True)
    for (score, greedy), (expected, most) in zip(
        found, hf.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert score == pytest.approx(expected, abs=1e-5)
        assert greedy == most
    facts = checking.get_model_info()["lspade"]
    assert facts["questions"] == 12
    assert facts["exited"] == 0
    assert facts["mean_exit_layer"] == 4
    assert facts["flops_saved"] < 0  # the checks are paid for


@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
def test_an_early_answer_is_spades_log_likelihood_at_that_layer(lspade, scope):
    early = lspade(ExitPolicy.always(LAYER, scope=scope))
    requests = questions()
    found = early.loglikelihood(requests, disable_tqdm=True)
    for request, (score, greedy) in zip(requests, found, strict=True):
        context, choice = request.args
        ids = torch.tensor([early.tok_encode(context)])
        expected = spade_logits(early.model, ids, layers=[LAYER])[0, 0].log_softmax(-1)
        token = early.tokenizer.convert_tokens_to_ids(choice.strip())
        assert score == pytest.approx(float(expected[token]), abs=1e-5)
        assert greedy == (int(expected.argmax()) == token)


@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
@torch.no_grad()
def test_a_heads_answer_is_a_log_likelihood_over_the_vocabulary(lspade, scope):
    policy = ExitPolicy.always(LAYER, decoder="l-spade", scope=scope)
    early = lspade(policy)
    requests = questions()
    found = early.loglikelihood(requests, disable_tqdm=True)
    probe = early.runtime.probe
    for request, (score, greedy) in zip(requests, found, strict=True):
        context, choice = request.args
        ids = torch.tensor([early.tok_encode(context)])
        hidden = early.model(ids, output_hidden_states=True).hidden_states[LAYER][:, -1]
        logits = probe.adapter.unembed(probe.heads.translate(hidden, LAYER)[:, None])[0, 0]
        token = early.tokenizer.convert_tokens_to_ids(choice.strip())
        assert score == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)
        assert greedy == (int(logits.argmax()) == token)


def test_the_results_report_the_exit_layers_and_savings(lspade):
    policy = ExitPolicy.always(LAYER)
    early = lspade(policy)
    requests = questions()
    early.loglikelihood(requests, disable_tqdm=True)
    contexts = {request.args[0] for request in requests}
    tokens = torch.tensor([len(early.tok_encode(context)) for context in contexts])
    counts = count_flops(early.model, early.runtime.heads)
    paid = exit_flops(counts, tokens, [LAYER], policy).sum() / counts.full(tokens).sum()
    facts = early.get_model_info()["lspade"]
    assert facts["flops_saved"] == pytest.approx(1 - float(paid))
    assert facts == {
        "questions": len(contexts),
        "white_space_read_as_prompt": 0,
        "full_model_requests": {},
        "num_layers": 4,
        "exited": 1.0,
        "mean_exit_layer": LAYER,
        "flops_saved": facts["flops_saved"],
    }


@pytest.fixture(scope="module")
def newlines(toy_root, tmp_path_factory):
    """That model with a tokenizer in which a newline is a token, as in chat models."""
    folder = tmp_path_factory.mktemp("newlines") / "model"
    shutil.copytree(toy_root / "model", folder)
    vocabulary = {
        w: i for i, w in enumerate(["<unk>", "<s>", "\n", "A", "B", "C", "?", ":", *WORDS])
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


def chats(choices=("A", "B", "C")) -> list[Instance]:
    """Contexts that end like a chat template."""
    return asked("loglikelihood", *[(f"w{n} ? :\n", c) for n in range(6) for c in choices])


def test_trailing_white_space_of_a_chat_template_is_part_of_the_prompt(
    newlines, heads, tmp_path, caplog
):
    ExitPolicy.always(LAYER).save(tmp_path)
    early = LSpadeLM(pretrained=newlines, heads=str(heads), policy=str(tmp_path), device="cpu")
    requests = chats()
    with caplog.at_level("WARNING", "lm_eval.lspade"):
        found = early.loglikelihood(requests, disable_tqdm=True)
    for request, (score, _) in zip(requests, found, strict=True):
        context, choice = request.args
        ids = torch.tensor([early.tokenizer(context)["input_ids"]])
        assert early.tokenizer.decode(ids[0, -1]) == "\n"
        expected = spade_logits(early.model, ids, layers=[LAYER])[0, 0].log_softmax(-1)
        token = early.tokenizer.convert_tokens_to_ids(choice)
        assert score == pytest.approx(float(expected[token]), abs=1e-5)
    facts = early.get_model_info()["lspade"]
    assert (facts["questions"], facts["white_space_read_as_prompt"]) == (6, 6)
    assert facts["full_model_requests"] == {}
    assert [r.message for r in caplog.records].count(
        "6 of 6 questions end in white space, as chat templates do: it is read as part of the "
        "prompt, and scores are of the answer behind it."
    ) == 1


def test_choices_after_trailing_white_space_are_ranked_as_by_hf(newlines, heads, tmp_path):
    ExitPolicy(layers=(1,), threshold=0.0).save(tmp_path)
    never = LSpadeLM(pretrained=newlines, heads=str(heads), policy=str(tmp_path), device="cpu")
    plain = HFLM(pretrained=newlines, device="cpu")
    mine, theirs = (
        torch.tensor([score for score, _ in m.loglikelihood(chats(), disable_tqdm=True)])
        for m in (never, plain)
    )
    # One term per question is omitted: the likelihood of the white space itself.
    left_out = (theirs - mine).reshape(6, 3)
    torch.testing.assert_close(left_out, left_out[:, :1].expand(6, 3), atol=1e-4, rtol=0)
    assert (left_out < 0).all()


def test_a_warning_is_logged_if_no_request_goes_through_the_runtime(lspade, caplog):
    early = lspade(ExitPolicy.always(LAYER))
    with caplog.at_level("WARNING", "lm_eval.lspade"):
        early.loglikelihood(questions(4, ("A B", "B C")), disable_tqdm=True)
    assert "NO REQUEST WENT THROUGH EARLY EXITS: all 8 " in caplog.text
    assert "(8 of 2 tokens)" in caplog.text


def test_a_first_word_shared_by_the_choices_is_not_white_space(lspade, hf):
    early = lspade(ExitPolicy.always(LAYER))
    shared = questions(3, ("A B", "A C"))
    assert early.loglikelihood(shared, True) == hf.loglikelihood(shared, True)


def test_short_labels_are_scored_at_the_first_differing_token(model, heads, tmp_path):
    ExitPolicy.always(LAYER).save(tmp_path)
    early = LSpadeLM(
        pretrained=model, heads=str(heads), policy=str(tmp_path), device="cpu", label_tokens=3
    )
    labels = ("w1 A", "w1 B C")
    requests = questions(3, labels)
    for request, (score, best) in zip(requests, early.loglikelihood(requests, True), strict=True):
        context, choice = request.args
        ids = torch.tensor([early.tokenizer(context + " w1")["input_ids"]])
        expected = spade_logits(early.model, ids, layers=[LAYER])[0, 0].log_softmax(-1)
        token = early.tokenizer.convert_tokens_to_ids(choice.split()[1])
        assert score == pytest.approx(float(expected[token]), abs=1e-5)
        assert best == (token == int(expected.argmax()))
    early.loglikelihood(questions(2, ("w1 A", "w1 B", "w2")), True)
    facts = early.get_model_info()["lspade"]
    assert facts["questions"] == 3
    assert facts["full_model_requests"] == {"continuations": 6}


def test_a_lone_continuation_of_several_tokens_is_left_to_the_full_model(
    model, heads, hf, tmp_path
):
    ExitPolicy.always(LAYER).save(tmp_path)
    early = LSpadeLM(
        pretrained=model, heads=str(heads), policy=str(tmp_path), device="cpu", label_tokens=3
    )
    lone = questions(3, ("w1 B C",))
    assert early.loglikelihood(lone, True) == hf.loglikelihood(lone, True)


def test_a_question_with_a_longer_choice_is_left_to_the_full_model(lspade, hf):
    early = lspade(ExitPolicy.always(LAYER))
    mixed = questions(5, ("A", "B C"))
    assert early.loglikelihood(mixed, disable_tqdm=True) == hf.loglikelihood(
        mixed, disable_tqdm=True
    )
    assert early.get_model_info()["lspade"]["full_model_requests"] == {"continuations": 10}


def test_rolling_likelihoods_and_generation_use_the_full_model(lspade, hf):
    early = lspade(ExitPolicy.always(LAYER))
    texts = asked("loglikelihood_rolling", ("w1 w2 w3",), ("w4",))
    prompts = asked("generate_until", ("w1 w2", {"max_gen_toks": 3}))
    assert early.loglikelihood_rolling(texts, True) == hf.loglikelihood_rolling(texts, True)
    assert early.generate_until(prompts, True) == hf.generate_until(prompts, True)
    assert early.get_model_info()["lspade"]["full_model_requests"] == {
        "rolling windows": 2,
        "generated texts": 1,
    }


def test_an_overlong_context_is_truncated_on_the_left_as_by_hf(lspade, hf):
    checking = lspade(ExitPolicy(layers=(1,), threshold=0.0))
    long = asked("loglikelihood", *[(" ".join(WORDS[:40] * 20), f" {c}") for c in "AB"])
    assert len(hf.tok_encode(long[0].args[0])) > hf.max_length
    found = checking.loglikelihood(long, disable_tqdm=True)
    expected = hf.loglikelihood(long, disable_tqdm=True)
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-5)
    assert checking.get_model_info()["lspade"]["questions"] == 1


def test_unsupported_requests_are_rejected_with_the_remedy(model, heads, lspade, tmp_path):
    with pytest.raises(PolicyError, match=r"neither heads nor a policy.*policy=never"):
        LSpadeLM(pretrained=model, device="cpu")
    with pytest.raises(PolicyError, match=r"policy\.json does not exist.*calibrate"):
        LSpadeLM(pretrained=model, heads=str(heads), device="cpu")
    ExitPolicy.always(LAYER).save(tmp_path)
    with pytest.raises(ArtifactError, match="another configuration"):
        LSpadeLM(
            pretrained=str(ROOT / "checkpoints/tiny-world"), heads=str(heads),
            policy=str(tmp_path), device="cpu",
        )  # fmt: skip


def test_a_harness_task_scores_the_same_without_exits_as_with_hf(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    scores = {}
    for name, policy in (("hf", ""), ("lspade", ",policy=never")):
        scores[name] = simple_evaluate(
            model=name, model_args=f"pretrained=checkpoints/tiny-world{policy}",
            tasks=["tiny_world"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            device="cpu", batch_size=8, limit=24, bootstrap_iters=0,
        )  # fmt: skip
    hf, never = ([row["resps"] for row in s["samples"]["tiny_world"]] for s in scores.values())
    assert never == hf
    assert len(hf) == 24
    assert scores["lspade"]["results"] == scores["hf"]["results"]
    assert scores["lspade"]["results"]["tiny_world"]["acc,none"] > 0.9
    assert scores["lspade"]["config"]["lspade"]["full_model_requests"]["continuations"] > 48


def test_the_harness_finds_the_model_by_its_name():
    [entry] = entry_points(group="lm_eval.models", name="lspade")
    assert entry.load() is get_model("lspade") is LSpadeLM


@pytest.mark.slow
def test_other_programs_do_not_load_this_package():
    assert printed("import sys, torch\nprint('lspade_train' in sys.modules)") == "False"


@pytest.mark.slow
def test_the_harness_command_finds_the_model():
    command = [sys.executable, "-m", "lspade_train.integrations.lm_eval", "--model", "lspade"]
    done = subprocess.run([*command, "--tasks", "no_such"], capture_output=True, text=True)
    assert "no_such" in done.stdout + done.stderr


def printed(code: str) -> str:
    """The output of a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def harness(tmp_path: Path, model: str, arguments: str) -> dict:
    """Run the harness's own command line; its results file and its output."""
    output = tmp_path / model / "results.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "lspade_train.integrations.lm_eval",
            "--model", model, "--model_args", arguments,
            "--include_path", str(TASKS), "--tasks", "tiny_world", "--device", "cpu",
            "--batch_size", "32", "--output_path", str(output),
        ],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = output.parent.glob("results*.json")
    return json.loads(file.read_text()) | {"printed": done.stdout + done.stderr}


@pytest.mark.slow
def test_the_command_line_applies_the_calibrated_policy_and_reports_exits(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    heads = tmp_path / "heads"
    monkeypatch.setattr("lspade_train.recipe.heads_folder", lambda recipe: heads)
    recipe = ["--config=recipes/quickstart.yaml", f"--data.cache_dir={tmp_path / 'cache'}"]
    assert main(["fit", *recipe, "--trainer.enable_progress_bar=false"]) == 0
    assert main(["calibrate", *recipe, "--max_accuracy_drop", "0.01"]) == 0
    full = harness(tmp_path, "hf", "pretrained=checkpoints/tiny-world")
    early = harness(tmp_path, "lspade", f"pretrained=checkpoints/tiny-world,heads={heads}")
    accuracy = [run["results"]["tiny_world"]["acc,none"] for run in (full, early)]
    assert accuracy[0] - accuracy[1] <= 0.01
    facts = early["config"]["lspade"]
    assert facts["questions"] == 2000
    assert facts["exited"] > 0.3
    assert facts["flops_saved"] > 0.05
    assert f"{facts['exited']:.1%} exited" in early["printed"]
