"""Tasks: the rendered prompts and the right tokens, against files read by hand."""

import dataclasses
import datetime
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from lspade_train import tasks
from lspade_train.errors import RecipeError, TaskError
from lspade_train.recipe import DataConfig, PromptConfig, TextConfig
from lspade_train.tasks import sources

ARC = "allenai/ai2_arc"
CONTEXT = 4096
REAL = [
    # task, subset, folder, labels
    ("arc_easy", None, f"{ARC}/ARC-Easy", "ABCDE"),
    ("arc_challenge", None, f"{ARC}/ARC-Challenge", "ABCDE"),
    ("headqa", None, "EleutherAI/headqa/en", "ABCDE"),
    ("headqa", "es", "EleutherAI/headqa/es", "ABCDE"),
    ("boolq", None, "google/boolq/data", "yn"),
]


@pytest.fixture(scope="session")
def tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture
def mini(shared):
    """Build recipes' data sections over the first 32 rows of each benchmark."""
    folders = {"arc_easy": ARC, "arc_challenge": ARC, "boolq": "google/boolq"}

    def make(task, **settings):
        folder = shared / "data/hub-mini" / folders.get(task, "EleutherAI/headqa")
        if task == "boolq":
            settings.setdefault("prompt", PromptConfig(labels=["y", "n"]))
        return DataConfig(model_id="unused", task=task, **{"dataset": str(folder)} | settings)

    return make


def encode(config, tokenizer, split="train", context=CONTEXT):
    return tasks.encode(config, tasks.load_rows(config, split), tokenizer, context)


def prompt_texts(encoded, tokenizer):
    return [tokenizer.decode(e.input_ids, skip_special_tokens=True) for e in encoded.examples]


def by_hand(task, row):
    """Prompt, number of choices and index of the right one, written independently."""
    if task == "boolq":
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return prompt, 2, 0 if row["answer"] else 1
    if task == "headqa":
        options = {answer["aid"]: answer["atext"].strip() for answer in row["answers"]}
        question, right = row["qtext"].strip(), list(options).index(row["ra"])
        texts = list(options.values())
    else:
        question, texts = row["question"], row["choices"]["text"]
        right = row["choices"]["label"].index(row["answerKey"])
    listed = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCDE", texts, strict=False))
    return f"Question: {question}\n{listed}Answer:", len(texts), right


def jsonl(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


UNCUT = {"validation_fraction": 0.0, "test_fraction": 0.0}
CUT = {"validation_fraction": 0.1, "test_fraction": 0.1}


def own(path, **settings):
    """Rows that are not split, unless a fraction says so."""
    known = {"model_id": "unused", "task": "jsonl", "dataset": str(path)}
    return DataConfig(**known | UNCUT | settings)


def word_level(template="<s> $A", chat_template=None):
    """A whole-word tokenizer; `template` says which special tokens it adds."""
    words = "<unk> <s> </s> user assistant system : A B C yes no what is it ? . Question Answer"
    vocabulary = {word: i for i, word in enumerate(words.split())}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant :\n{% endif %}"
)


# Benchmarks


@pytest.mark.parametrize(("task", "subset", "folder", "labels"), REAL)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_prompts_and_answers_match_the_files_read_by_hand(
    task, subset, folder, labels, split, mini, shared, tokenizer
):
    file = next((shared / "data/hub-mini" / folder).glob(f"{split}-*.parquet"))
    encoded = encode(mini(task, subset=subset), tokenizer, split)
    rows = pq.read_table(file).to_pylist()
    assert len(encoded.examples) == len(rows) == 32
    tokens = [tokenizer.convert_tokens_to_ids(encoded.prefix.replace(" ", "▁") + x) for x in labels]
    for example, row in zip(encoded.examples, rows, strict=True):
        prompt, choices, right = by_hand(task, row)
        assert example.input_ids.tolist() == tokenizer(prompt)["input_ids"]
        assert example.choice_ids == tuple(tokens[:choices])
        assert example.answer_ids.tolist() == [tokens[right]]
        assert example.positions.tolist() == [len(example.input_ids) - 1]
        assert (example.input_ids.dtype, example.positions.dtype) == (np.int32, np.int64)


def test_arc_challenge_encodes_completely_with_its_official_counts(shared, tokenizer):
    folder = str(shared / "data/hub" / ARC)
    config = DataConfig(model_id="unused", task="arc_challenge", dataset=folder)
    counts = [len(encode(config, tokenizer, split).examples) for split in ("train", "validation")]
    assert counts == [1119, 299]


def test_numeric_option_labels_are_matched_by_position(tmp_path, tokenizer):
    row = {
        "question": "Which is a metal?",
        "choices": {"text": ["oak", "wool", "iron", "milk"], "label": ["1", "2", "3", "4"]},
        "answerKey": "3",
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: ARC-Easy\n  data_files: train.parquet\n---\n"
    )
    config = DataConfig(model_id="unused", task="arc_easy", dataset=str(tmp_path))
    example = encode(config, tokenizer).examples[0]
    assert tokenizer.decode(example.answer_ids) == "C"
    assert "C. iron\n" in tokenizer.decode(example.input_ids)


def test_headqa_is_grouped_by_category(mini, tokenizer):
    assert {e.group for e in encode(mini("headqa"), tokenizer).examples} == {"biology"}


def test_limit_keeps_the_first_rows(mini, tokenizer):
    few, all_ = (encode(mini("arc_easy", limit=n), tokenizer).examples for n in (5, None))
    assert [e.input_ids.tolist() for e in few] == [e.input_ids.tolist() for e in all_[:5]]


def test_boolq_is_evaluated_on_validation_as_it_has_no_test_split(mini):
    assert tasks.splits(mini("boolq")) == ("train", "validation")
    assert tasks.evaluation_split(mini("boolq")) == "validation"
    assert tasks.evaluation_split(mini("arc_easy")) == "test"


# Answer tokens


def test_the_answer_prefix_is_empty_if_a_space_is_a_separate_token(mini, tokenizer):
    assert encode(mini("arc_easy"), tokenizer).prefix == ""
    assert encode(mini("boolq"), tokenizer).prefix == " "


def test_the_answer_prefix_is_empty_after_trailing_white_space(mini, tokenizer):
    prompt = PromptConfig(labels=["y", "n"], template="{question}\n")
    assert encode(mini("boolq", prompt=prompt), tokenizer).prefix == ""


@pytest.mark.parametrize("prefix", ["", " "])
def test_a_given_prefix_is_the_only_one_tried(prefix, mini, tokenizer):
    prompt = PromptConfig(labels=["y", "n"], answer_prefix=prefix)
    encoded = encode(mini("boolq", prompt=prompt), tokenizer)
    assert encoded.prefix == prefix
    text = prompt_texts(encoded, tokenizer)[0] + prefix
    assert tokenizer(text + "y")["input_ids"][-1] == encoded.examples[0].choice_ids[0]
    # After a space "B" is one token and the other letters are two, with the same first token.
    for example in encode(
        mini("arc_easy", prompt=PromptConfig(answer_prefix=" ")), tokenizer
    ).examples:
        inside = tokenizer.convert_ids_to_tokens(int(example.input_ids[-1])) == "▁"
        options = tokenizer.convert_ids_to_tokens(list(example.choice_ids))
        assert options[:2] == (["A", "C"] if inside else ["▁", "▁B"])


def test_multi_token_words_are_decided_at_their_first_token(mini, tokenizer):
    encoded = encode(mini("boolq", prompt=PromptConfig()), tokenizer)
    firsts = [tokenizer.tokenize(word)[0] for word in ("yes", "no")]
    assert encoded.prefix == " "
    for example in encoded.examples:
        assert tokenizer.convert_ids_to_tokens(list(example.choice_ids)) == firsts
    assert "' yes' is" not in encoded.labels
    assert "'yes' is ['▁y', 'es']" in encoded.labels


def test_labels_with_the_same_tokens_raise_an_error_with_remedies():
    with pytest.raises(TaskError) as caught:
        tasks.resolve_choices(word_level(), "what ?", ["yes", "yes no"])
    message = str(caught.value)
    assert "'yes' is the beginning of 'yes no'" in message
    assert "--data.prompt.labels" in message
    assert "--data.prompt.answer_prefix" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (["A", "perhaps"], "'perhaps' is the unknown token"),
        (["A", "A"], "'A' is the same token as 'A'"),
        (["A", "A no"], "'A' is the beginning of 'A no'"),
        (["yes no"], "'yes no' is 2 tokens"),
        (["A", ""], "'' is 0 tokens"),
    ],
)
def test_a_label_without_a_distinct_token_is_rejected(labels, problem):
    with pytest.raises(TaskError, match=problem):
        tasks.resolve_choices(word_level(), "Question what ? Answer :", labels, "")


def test_a_label_that_changes_the_prompts_tokenization_is_rejected(tokenizer):
    # "th" + "e" is the token "the": the prompt would end differently.
    with pytest.raises(TaskError, match=r"'e' merges with the end of the prompt into \['▁the'\]"):
        tasks.resolve_choices(tokenizer, "once upon th", ["e"], "")


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text("abeht :.\nÑ", max_size=12),
    labels=st.lists(st.text("abeht", min_size=1, max_size=3), min_size=1, max_size=3),
    prefix=st.sampled_from([None, "", " ", "\n"]),
)
def test_resolved_choices_continue_the_prompt_by_exactly_their_tokens(
    tokenizer, prompt, labels, prefix
):
    try:
        paths = tasks.resolve_choices(tokenizer, prompt, labels, prefix)
    except TaskError:
        return
    before = tokenizer(prompt)["input_ids"]
    allowed = [prefix] if prefix is not None else ["", " "]
    assert any(
        all(
            tokenizer(prompt + text + label)["input_ids"] == [*before, *path]
            for label, path in paths.items()
        )
        for text in allowed
    )
    assert len(set(paths.values())) == len(labels)


def test_prompts_with_different_endings_are_rejected_naming_the_row(tmp_path, tokenizer):
    rows = [
        {"prompt": "once upon:", "choices": ["e", "a"], "answer": "a"},
        {"prompt": "once upon th", "choices": ["e", "a"], "answer": "a"},
    ]
    prompt = PromptConfig(answer_prefix="")
    with pytest.raises(TaskError, match=r"(?s)after the prompt of row 2.*--data.prompt.template"):
        encode(own(jsonl(tmp_path, "train", rows), prompt=prompt), tokenizer)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_prompts_start_with_a_single_bos_and_never_end_with_eos(template):
    bos = [1] if "<s>" in template else []
    tokenizer = word_level(template)
    written = [*bos, 12, 13] if bos else [1, 12, 13]
    assert list(tasks.tokenize(tokenizer, ["what is", "<s> what is"])) == [[*bos, 12, 13], written]


# Prompts


def test_few_shot_examples_are_solved_training_rows(mini, shared, tokenizer):
    config = mini("arc_easy", prompt=PromptConfig(shots=2))
    file = next((shared / f"data/hub-mini/{ARC}/ARC-Easy").glob("train-*.parquet"))
    solved = {
        prompt + "ABCDE"[right]
        for prompt, _, right in (
            by_hand("arc_easy", row) for row in pq.read_table(file).to_pylist()
        )
    }
    for split in ("train", "validation"):
        for text in prompt_texts(encode(config, tokenizer, split), tokenizer):
            first, second, asked = text.split("\n\n")
            assert {first, second} <= solved
            assert first != second
            assert asked.endswith("Answer:")


def test_no_prompt_shows_its_own_answer(mini, tokenizer):
    config = mini("arc_easy", prompt=PromptConfig(shots=3))
    texts = prompt_texts(encode(config, tokenizer), tokenizer)
    shown = {shot for text in texts for shot in text.split("\n\n")[:-1]}
    asked = [text.split("\n\n")[-1] for text in texts]
    assert sum(any(shot.startswith(text) for shot in shown) for text in asked) == 4
    assert not any(text.count(question) > 1 for text, question in zip(texts, asked, strict=True))


def test_a_training_copy_of_a_test_row_is_not_used_as_its_example(tmp_path, tokenizer):
    rows = [{"question": f"q{i}", "choices": ["x", "y"], "answer": 0} for i in range(3)]
    jsonl(tmp_path, "train", [*rows, *rows])
    jsonl(tmp_path, "test", [{**row, "choices": ["y", "x"]} for row in rows])
    config = own(tmp_path, prompt=PromptConfig(shots=2))
    for i, text in enumerate(prompt_texts(encode(config, tokenizer, "test"), tokenizer)):
        assert text.count(f"q{i}\n") == 1
        assert text.count("Question:") == 3


def test_too_few_training_rows_for_the_few_shot_examples_raises_an_error(mini):
    with pytest.raises(TaskError, match=r"33 labelled training rows.*--data.prompt.shots"):
        tasks.load_rows(mini("arc_easy", prompt=PromptConfig(shots=32)), "train")


def test_a_recipes_template_replaces_the_tasks_template(mini, tokenizer):
    config = mini("arc_easy", prompt=PromptConfig(template="{{x}} {question}\nA letter:"))
    text = prompt_texts(encode(config, tokenizer), tokenizer)[0]
    assert text.startswith("{x} ")
    assert text.endswith("?\nA letter:")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{passage}", r"names {passage}.*{question}, {choices}"),
        ("{question.x}", r"names {question.x}"),
        ("{}", r"names {}"),
        ("{question", r"not a format string.*{question}, {choices}"),
        ("{question:{w}}", r"names {w}.*{question}, {choices}"),
        ("{question:{choices}}", r"not a format string"),
        ("{question!x}", r"not a format string"),
    ],
)
def test_a_template_that_cannot_be_filled_raises_an_error(template, problem, mini, tokenizer):
    with pytest.raises(TaskError, match=problem) as caught:
        encode(mini("arc_easy", prompt=PromptConfig(template=template)), tokenizer)
    assert "--data.prompt.template" in str(caught.value)


QUESTION = {"prompt": "what is it ?", "choices": ["yes", "no"], "answer": "no"}


@pytest.mark.parametrize("source", ["tokenizer", "recipe"])
def test_chat_prompts_follow_the_chat_template(source, tmp_path):
    mine = source == "recipe"
    tokenizer = word_level(chat_template=None if mine else CHAT)
    prompt = PromptConfig(chat=True, chat_template=CHAT if mine else None, system="yes", shots=1)
    rows = [QUESTION, {**QUESTION, "prompt": "is it ?", "answer": "yes"}]
    encoded = encode(own(jsonl(tmp_path, "train", rows), prompt=prompt), tokenizer)
    assert tokenizer.decode(encoded.examples[0].input_ids) == (
        "<s> system : yes </s> user : is it ? </s> assistant : yes </s> "
        "user : what is it ? </s> assistant :"
    )
    assert encoded.prefix == ""


def test_chat_templates_render_without_thinking_or_todays_date(tmp_path):
    template = "{{ enable_thinking }} {{ date_string }} {{ messages[0].content }} :"
    prompt = PromptConfig(chat=True, chat_template=template, template="Question")
    config = own(jsonl(tmp_path, "train", [QUESTION]), prompt=prompt)
    seen = []

    class Spy(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args, **kwargs):
            seen.append(super().apply_chat_template(*args, **kwargs))
            return seen[-1]

    encode(config, Spy(tokenizer_object=word_level().backend_tokenizer, unk_token="<unk>"))
    assert set(seen) == {"False 26 Jul 2024 Question :"}


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (PromptConfig(chat=True), "no chat template.*--data.prompt.chat false"),
        (PromptConfig(system="yes"), "--data.prompt.chat true"),
        (PromptConfig(chat_template=CHAT), "--data.prompt.chat true"),
        (
            PromptConfig(chat=True, chat_template="{{ raise_exception('no system role') }}"),
            "refuses the prompt: no system role.*data.prompt.system",
        ),
        (
            PromptConfig(chat=True, chat_template="{{ 1 + messages[0].content }}"),
            "refuses the prompt: unsupported operand",
        ),
    ],
)
def test_invalid_chat_settings_raise_an_error(prompt, problem, tmp_path):
    with pytest.raises(TaskError, match=problem):
        encode(own(jsonl(tmp_path, "train", [QUESTION]), prompt=prompt), word_level())


def test_overlong_prompts_raise_an_error_or_are_skipped(mini, tokenizer):
    lengths = [len(e.input_ids) for e in encode(mini("arc_easy"), tokenizer).examples]
    context = sorted(lengths)[-3]
    longer = [i for i, length in enumerate(lengths) if length > context]
    first = f"{len(longer)} of 32 .* context of {context} tokens; the first is row {longer[0] + 1} "
    with pytest.raises(TaskError, match=first + rf"with {lengths[longer[0]]}\.\n.*overlong skip"):
        encode(mini("arc_easy"), tokenizer, context=context)
    kept = encode(mini("arc_easy", overlong="skip"), tokenizer, context=context)
    assert kept.skipped == len(longer)
    assert [len(e.input_ids) for e in kept.examples] == [n for n in lengths if n <= context]
    with pytest.raises(TaskError, match="32 of 32 prompts"):
        encode(mini("arc_easy", overlong="skip"), tokenizer, context=10)


# The user's own rows


@pytest.mark.parametrize(
    ("row", "answer", "choices"),
    [
        ({"prompt": "is it ?", "choices": ["no", "yes"], "answer": "yes"}, "yes", "no yes"),
        ({"prompt": "is it ?", "choices": ["no", "yes"], "answer": 0}, "no", "no yes"),
        ({"prompt": "is it ?", "answer": "yes"}, "yes", ""),
        ({"prompt": "is it ?", "choices": ["no", "yes"]}, None, "no yes"),
        ({"question": "is it", "choices": ["it", "is", "what"], "answer": 2}, "C", "A B C"),
        ({"question": "is it", "choices": ["it", "is", "what"], "answer": "B"}, "B", "A B C"),
        ({"question": "is it", "choices": ["it", "is", "what"], "answer": "it"}, "A", "A B C"),
        ({"question": "is it", "choices": ["it", "is", "it"], "answer": 2}, "C", "A B C"),
    ],
)
def test_own_rows_give_their_answer_by_index_label_or_text(row, answer, choices, tmp_path):
    tokenizer = word_level()
    (example,) = encode(own(jsonl(tmp_path, "train", [row])), tokenizer).examples
    assert tokenizer.convert_ids_to_tokens(example.choice_ids) == choices.split()
    if answer is None:
        assert example.answer_ids is None
    else:
        assert tokenizer.convert_ids_to_tokens(example.answer_ids) == [answer]


def test_the_recipes_labels_rename_the_choices_of_own_rows(tmp_path):
    tokenizer = word_level()
    row = {"prompt": "is it ?", "choices": ["true", "false"], "answer": "false"}
    config = own(jsonl(tmp_path, "train", [row]), prompt=PromptConfig(labels=["yes", "no"]))
    (example,) = encode(config, tokenizer).examples
    assert tokenizer.convert_ids_to_tokens(example.answer_ids) == ["no"]


def test_own_rows_can_vary_in_choices_and_have_extra_fields_and_a_group(tmp_path):
    tokenizer = word_level()
    rows = [
        {"prompt": "it", "about": "what", "choices": ["yes", "no"], "answer": 0, "group": "easy"},
        {"prompt": "is", "about": "Question", "choices": ["A", "B"], "answer": 1, "difficulty": 2},
    ]
    prompt = PromptConfig(template="{about} {prompt} :")
    config = own(jsonl(tmp_path, "train", rows), prompt=prompt)
    first, second = encode(config, tokenizer).examples
    assert tokenizer.decode(second.input_ids) == "<s> Question is :"
    assert tokenizer.convert_ids_to_tokens(first.choice_ids + second.choice_ids) == [
        "yes",
        "no",
        "A",
        "B",
    ]
    assert (first.group, second.group) == ("easy", "2")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{oops", "Expecting"),
        ("[1]", "not a JSON object"),
        ('{"prompt": NaN}', "NaN is not JSON"),
        ('{"text": "x"}', r"'prompt' or 'question' \(found: text\)"),
        ('{"prompt": ""}', "'prompt' or 'question'"),
        ('{"prompt": "x", "question": "x"}', "'prompt' or 'question'"),
        ('{"prompt": "x", "choices": "ab", "answer": "a"}', "not a list of strings"),
        ('{"prompt": "x", "choices": ["a"], "answer": "a"}', "1 choices"),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": "c"}', "names 0 of the 2 choices"),
        ('{"prompt": "x", "answer": 3}', "not a string"),
        ('{"question": "x"}', "a question needs choices"),
        ('{"question": "x", "choices": ["a", "b"], "answer": 2}', "names 0 of the 2 choices"),
        ('{"question": "x", "choices": ["a", "b"], "answer": true}', "names 0 of the 2"),
        ('{"question": "x", "choices": ["B", "A"], "answer": "A"}', "names 2 of the 2"),
        ('{"question": "x", "choices": ["a", "a"], "answer": "a"}', "names 2 of the 2"),
        ('{"prompt": "x", "choices": ["a", "a"], "answer": 0}', "holds a text twice"),
        ('{"prompt": "x", "choices": [], "answer": "a"}', "choices is an empty list"),
        ('{"question": "x", "choices": []}', "choices is an empty list"),
        ('{"prompt": "x", "choices": ["a", " "], "answer": "a"}', "holds an empty text"),
        (r'{"prompt": "x \ud800", "answer": "a"}', "half of a surrogate pair"),
        ('{"prompt": "x", "weight": 1e999}', "1e999 is too large"),
        ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_line_raises_an_error_with_its_line_number(line, problem, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n\n" + line + "\n")
    with pytest.raises(TaskError, match=rf"train.jsonl, line 3: .*{problem}.*Correct the line"):
        tasks.load_rows(own(path), "train")


def test_own_rows_can_come_from_a_folder_laid_out_like_a_hub_data_set(tmp_path):
    tokenizer = word_level()
    rows = [QUESTION, {"prompt": "is it ?", "choices": None, "answer": "A"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    first, second = encode(own(tmp_path), tokenizer).examples
    assert tokenizer.convert_ids_to_tokens(first.choice_ids) == ["yes", "no"]
    assert tokenizer.convert_ids_to_tokens(second.answer_ids) == ["A"]
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), tmp_path / "train.parquet")
    with pytest.raises(TaskError, match="Row 1 of the train split does not fit jsonl: needs text"):
        encode(own(tmp_path), tokenizer)


def many(count, start=0):
    return [{**QUESTION, "prompt": f"is it {i} ?"} for i in range(start, start + count)]


def sides(config):
    return {
        split: [row["prompt"] for row in tasks.load_rows(config, split).records]
        for split in tasks.splits(config)
    }


def test_one_file_is_split_by_fractions_of_its_rows(tmp_path):
    file = jsonl(tmp_path, "rows", many(2000))
    config = own(file, validation_fraction=0.2, test_fraction=0.05)
    found = sides(config)
    assert list(found) == ["train", "validation", "test"]
    assert sorted(sum(found.values(), [])) == sorted(row["prompt"] for row in many(2000))
    # Binomial: three standard deviations of a fraction of 2000 rows are at most 0.034.
    for split, share in zip(found, (0.75, 0.2, 0.05), strict=True):
        assert len(found[split]) / 2000 == pytest.approx(share, abs=0.034)


def test_adding_rows_to_a_file_moves_no_other_row_between_splits(tmp_path):
    few = sides(own(jsonl(tmp_path, "few", many(200)), **CUT))
    more = sides(own(jsonl(tmp_path, "more", [*many(100, start=900), *many(200)]), **CUT))
    assert all(set(few[split]) <= set(more[split]) for split in few)


def test_copies_of_a_question_stay_in_one_split(tmp_path):
    copies = [{**row, "choices": ["no", "yes"], "id": i} for i, row in enumerate(many(100))]
    found = sides(own(jsonl(tmp_path, "rows", [*many(100), *copies]), **CUT))
    assert not set(found["train"]) & {*found["validation"], *found["test"]}


def test_only_missing_splits_are_cut_from_the_training_rows(tmp_path):
    jsonl(tmp_path, "train", many(100))
    jsonl(tmp_path, "test", many(5, start=500))
    found = sides(own(tmp_path, **CUT))
    assert sorted(found["train"] + found["validation"]) == sorted(r["prompt"] for r in many(100))
    assert found["test"] == [row["prompt"] for row in many(5, start=500)]
    jsonl(tmp_path, "validation", many(5, start=600))
    assert sides(own(tmp_path, **CUT))["train"] == [row["prompt"] for row in many(100)]


def test_without_a_fraction_no_split_is_cut_and_the_error_gives_the_remedy(tmp_path):
    config = own(jsonl(tmp_path, "rows", many(20)))
    assert tasks.splits(config) == ("train",)
    with pytest.raises(TaskError, match=r"no validation split .*--data\.validation_fraction 0\.1"):
        tasks.require_splits(config, ("train", "validation"))


def test_fractions_that_leave_a_split_empty_raise_an_error(tmp_path):
    config = own(jsonl(tmp_path, "rows", many(3)), validation_fraction=0.001)
    with pytest.raises(TaskError, match=r"validation split .* empty.*--data\.validation_fraction"):
        tasks.load_rows(config, "validation")


def test_a_folders_splits_follow_its_file_names(tmp_path):
    jsonl(tmp_path, "validation", [QUESTION])
    assert tasks.splits(own(tmp_path)) == ("validation",)
    jsonl(tmp_path, "my-train.v2", many(3))
    jsonl(tmp_path, "notes", [{"text": "not a row"}])
    assert tasks.splits(own(tmp_path)) == ("train", "validation")
    assert len(tasks.load_rows(own(tmp_path), "train").records) == 3


CSV = """text,label,topic
is it ?,1,x
"what, is it ?",0,y
"""


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_csv_file_with_mapped_columns_and_integer_labels_is_read(suffix, tmp_path):
    rows = [{"text": "is it ?", "label": 1}, {"text": "what, is it ?", "label": 0}]
    text = CSV if suffix == "csv" else "text\tlabel\nis it ?\t1\nwhat, is it ?\t0\n"
    (tmp_path / f"rows.{suffix}").write_text(text)
    settings = {
        "columns": {"prompt": "text", "answer": "label"},
        "prompt": PromptConfig(labels=["no", "yes"]),
    }
    tokenizer = word_level()
    encoded = [
        encode(own(path, **settings), tokenizer).examples
        for path in (tmp_path / f"rows.{suffix}", jsonl(tmp_path, "rows", rows))
    ]
    for examples in encoded:
        answers = [tokenizer.convert_ids_to_tokens(e.answer_ids)[0] for e in examples]
        assert answers == ["yes", "no"]
        assert tokenizer.decode(examples[1].input_ids) == "<s> what <unk> is it ?"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("prompt,answer\nx,yes,no\n", "line 2: 3 cells under 2 columns"),
        ("prompt,prompt\nx,y\n", "line 1 names its columns"),
        ('prompt,choices\nx,"yes,no"\n', "line 2: choices 'yes,no' is not a JSON list"),
        ('prompt,answer\n"x,yes\n', "unexpected end of data"),
        ("text,label\nx,1\n", r"line 2: needs text under 'prompt' or 'question'"),
    ],
)
def test_an_invalid_csv_file_raises_an_error_with_the_line(text, problem, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(TaskError, match=problem):
        tasks.load_rows(own(tmp_path / "rows.csv"), "train")


def test_a_hub_data_sets_columns_are_mapped_and_its_dates_left_out(tmp_path):
    rows = [{"text": "is it ?", "label": 1, "when": np.datetime64("2020-01-01T00:00:00", "s")}]
    pq.write_table(pa.Table.from_pylist(rows * 40), tmp_path / "train.parquet")
    config = own(
        tmp_path,
        columns={"question": "text", "answer": "label"},
        prompt=PromptConfig(labels=["no", "yes"], template="{question} :"),
    )
    tokenizer = word_level()
    example = encode(config, tokenizer).examples[0]
    assert tokenizer.convert_ids_to_tokens(example.answer_ids) == ["yes"]
    assert tokenizer.decode(example.input_ids) == "<s> is it ? :"
    wrong = dataclasses.replace(config, columns={"question": "txt"})
    with pytest.raises(TaskError, match=r"no column 'txt' \(found: text, label.*--data.columns"):
        tasks.load_rows(wrong, "train")


def test_the_recipes_labels_are_the_choices_of_rows_without_any(tmp_path):
    row = {"question": "is it", "answer": 1, "group": 3}
    prompt = PromptConfig(labels=["no", "yes"])
    (example,) = encode(own(jsonl(tmp_path, "train", [row]), prompt=prompt), word_level()).examples
    tokens = word_level().convert_ids_to_tokens
    assert (tokens(example.choice_ids), tokens(example.answer_ids)) == (["no", "yes"], ["yes"])
    assert word_level().decode(example.input_ids) == "<s> Question : is it Answer :"
    assert example.group == "3"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_files_with_a_byte_order_mark_are_read(encoding, tmp_path):
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    text = mark + json.dumps({**QUESTION, "note": "ñ"}, ensure_ascii=False) + "\n"
    (tmp_path / "train.jsonl").write_bytes(text.encode(encoding))
    (row,) = tasks.load_rows(own(tmp_path), "train").records
    assert row["note"] == "ñ"


def test_a_file_in_another_encoding_raises_an_error_with_the_line(tmp_path):
    lines = json.dumps(QUESTION) + '\n{"prompt": "señor"}\n'
    (tmp_path / "train.jsonl").write_bytes(lines.encode("latin-1"))
    with pytest.raises(TaskError, match=r"line 2 is not UTF-8 text \(byte 0xf1\).*as UTF-8"):
        tasks.load_rows(own(tmp_path), "train")


def test_a_lone_surrogate_in_a_label_raises_a_clear_error():
    with pytest.raises(TaskError, match="half of a surrogate pair"):
        tasks.resolve_choices(word_level(), "Question", ["yes", "\ud800"])


@pytest.mark.parametrize("labels", [["A", "A"], ["A", ""], ["A"], []], ids=str)
def test_labels_with_the_same_tokens_are_rejected(labels):
    with pytest.raises(RecipeError, match=r"data\.prompt\.labels is .*two or more"):
        PromptConfig(labels=labels)


def test_a_test_split_without_labels_is_not_evaluated_on(tmp_path):
    jsonl(tmp_path, "validation", [QUESTION])
    jsonl(tmp_path, "test", [{"prompt": "what ?"}])
    assert tasks.evaluation_split(own(tmp_path)) == "validation"
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(TaskError, match=r"no validation split.*--data.dataset"):
        tasks.evaluation_split(own(tmp_path))


# Running text


def corpus(folder, texts, suffix="jsonl", **settings):
    path = folder / f"corpus.{suffix}"
    if suffix == "jsonl":
        jsonl(folder, "corpus", [{"text": text} for text in texts])
    else:
        path.write_text("\n\n".join(texts))
    return DataConfig(
        model_id="unused", task="text", dataset=str(path), text=TextConfig(**settings)
    )


STORIES = [
    f"Once upon a time there was a dog number {i}." + " He saw a big red ball in the park." * 9
    for i in range(60)
]


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
@pytest.mark.parametrize("count", [None, 5])
def test_text_answers_are_the_actual_next_tokens(suffix, count, tmp_path, tokenizer):
    config = corpus(
        tmp_path, STORIES, suffix, length=40, first_position=8, positions_per_sequence=count
    )
    rows = tasks.load_rows(config, "train")
    pieces = iter(tasks.encode(config, rows, tokenizer, 512).examples)
    for record in rows.records:
        ids = tokenizer(record["text"], add_special_tokens=False)["input_ids"]
        for begin in range(0, len(ids), 39):
            chunk = ids[begin : begin + 39]
            # One more if the text continues after the piece.
            last = len(chunk) if begin + 39 < len(ids) else len(chunk) - 1
            allowed = list(range(8, last + 1))
            if not allowed:
                continue
            example = next(pieces)
            positions = example.positions.tolist()
            assert example.input_ids.tolist() == [1, *chunk]
            assert example.answer_ids.tolist() == [ids[begin + p] for p in positions]
            assert set(positions) <= set(allowed)
            assert positions == sorted(set(positions))
            assert len(positions) == (len(allowed) if count is None else min(count, len(allowed)))
            assert example.choice_ids == ()
    assert next(pieces, None) is None


def test_text_positions_are_deterministic_and_differ_between_pieces(tmp_path, tokenizer):
    config = corpus(tmp_path, STORIES, length=40)
    drawn = [[e.positions.tolist() for e in encode(config, tokenizer).examples] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({tuple(positions) for positions in drawn[0]}) > len(drawn[0]) / 2


def test_a_single_file_corpus_is_split_by_text_keeping_copies_together(tmp_path):
    config = corpus(tmp_path, STORIES + STORIES[:20])
    assert tasks.splits(config) == tasks.SPLITS
    assert tasks.evaluation_split(config) == "test"
    sides = [
        [record["text"] for record in tasks.load_rows(config, split).records]
        for split in tasks.SPLITS
    ]
    assert sorted(text for side in sides for text in side) == sorted(STORIES + STORIES[:20])
    assert not any(set(a) & set(b) for a, b in [sides[:2], sides[1:], sides[::2]])
    assert len(sides[0]) > len(sides[1]) + len(sides[2]) > 0


def test_the_splits_of_a_text_folder_are_used_as_given(tmp_path, tokenizer):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text(STORIES[0])
    config = DataConfig(model_id="unused", task="text", dataset=str(tmp_path))
    assert tasks.splits(config) == ("train", "validation")
    assert tasks.evaluation_split(config) == "validation"
    assert len(encode(config, tokenizer, "validation", 512).examples) == 1


def test_empty_entries_in_a_hub_style_corpus_are_ignored(tmp_path, tokenizer):
    rows = [{"story": text} for text in [STORIES[0], "", None, STORIES[1]]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    text = TextConfig(column="story")
    config = DataConfig(model_id="unused", task="text", dataset=str(tmp_path), text=text)
    encoded = encode(config, tokenizer, context=512)
    assert (len(encoded.examples), encoded.skipped) == (2, 0)
    assert tasks.evaluation_split(config) == "test"


def test_a_folder_of_text_files_is_split_at_blank_lines_like_one_file(tmp_path):
    texts = ["One story.\nIts second line.", "Another."]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "b.txt").write_text(texts[0].upper())
    config = DataConfig(model_id="unused", task="text", dataset=str(tmp_path), **UNCUT)
    rows = tasks.load_rows(config, "train").records
    assert [row["text"] for row in rows] == [*texts, texts[0].upper()]


def test_texts_too_short_for_one_position_are_counted(tmp_path, tokenizer):
    (tmp_path / "train.txt").write_text("The end.\n\n" + STORIES[0])
    (tmp_path / "validation.txt").write_text("The end.")
    config = DataConfig(model_id="unused", task="text", dataset=str(tmp_path))
    assert encode(config, tokenizer).skipped == 1
    with pytest.raises(TaskError, match=r"more than 9 tokens.*--data.text.first_position"):
        encode(config, tokenizer, "validation")


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"length": 513}, "--data.text.length"),
        ({"length": 1}, "--data.text.length"),
        ({"first_position": 160}, "--data.text.first_position"),
        ({"first_position": -1}, "--data.text.first_position"),
        ({"positions_per_sequence": 0}, "--data.text.positions_per_sequence"),
        ({"column": "story"}, "--data.text.column"),
    ],
)
def test_out_of_range_text_settings_raise_an_error(settings, remedy, tmp_path, tokenizer):
    with pytest.raises(TaskError, match=remedy):
        encode(corpus(tmp_path, STORIES, **settings), tokenizer, context=512)


# Identity


def identity(config, tokenizer, split="train"):
    return tasks.identity(config, tasks.load_rows(config, split), tokenizer)


def test_the_digest_depends_on_the_rows_not_their_location(mini, shared, tmp_path, tokenizer):
    copy = shutil.copytree(shared / "data/hub-mini" / ARC, tmp_path / "elsewhere")
    here, there = mini("arc_easy"), mini("arc_easy", dataset=str(copy))
    first, second = (identity(c, tokenizer) for c in (here, there))
    assert first == second
    shorter = tasks.load_rows(mini("arc_easy", limit=31), "train")
    assert shorter.digest != first["rows_digest"]


def test_the_digest_depends_only_on_the_columns_used(tmp_path):
    row = {"passage": "p", "question": "q", "answer": True, "comment": "x"}

    def digest(**changes):
        pq.write_table(pa.Table.from_pylist([row | changes]), tmp_path / "train.parquet")
        config = DataConfig(model_id="unused", task="boolq", dataset=str(tmp_path))
        return tasks.load_rows(config, "train").digest

    assert digest() == digest(comment="y")
    assert len({digest(), digest(passage="P"), digest(question="Q"), digest(answer=False)}) == 4


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("template", "{prompt} :", {"template"}),
        ("labels", ["A", "B"], {"labels"}),
        ("shots", 1, {"shots", "shots_digest"}),
        ("chat_template", CHAT + "x", {"chat_template"}),
        ("system", "x", {"system"}),
        ("answer_prefix", "", {"answer_prefix"}),
    ],
)
def test_every_prompt_setting_is_a_named_field_of_the_identity(field, value, named, tmp_path):
    rows = [QUESTION, {**QUESTION, "prompt": "what ?"}]
    path = jsonl(tmp_path, "train", rows)
    chat = {"chat": True, "chat_template": CHAT} if field in {"chat_template", "system"} else {}
    prompts = (PromptConfig(**chat), PromptConfig(**chat | {field: value}))
    plain, changed = (identity(own(path, prompt=prompt), word_level()) for prompt in prompts)
    different = {name for name in plain if plain[name] != changed[name]}
    assert different - {"rendered_prompts"} == named
    assert json.loads(json.dumps(changed)) == changed


def test_a_date_dependent_prompt_changes_the_identity_with_the_date(tmp_path, monkeypatch):
    prompt = PromptConfig(
        chat=True, chat_template="{{ strftime_now('%Y') }} {{ messages[0].content }} :"
    )
    config = own(jsonl(tmp_path, "train", [QUESTION]), prompt=prompt)
    found = []
    for year in (2024, 2024, 2025):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, year=year):
                return cls(year, 1, 1)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        found.append(identity(config, word_level()))
    assert found[0] == found[1]
    assert {k for k in found[0] if found[0][k] != found[2][k]} == {"rendered_prompts"}


def test_examples_prefixes_and_rows_all_change_the_rendered_prompts_digest(tmp_path):
    rows = [QUESTION, {**QUESTION, "prompt": "what ?"}, {**QUESTION, "prompt": "is it ?"}]
    path = jsonl(tmp_path, "train", rows)
    settings = ({}, {"shots": 1}, {"shots": 2}, {"template": "{prompt} :"}, {"answer_prefix": ""})
    digests = [
        identity(own(path, prompt=PromptConfig(**s)), word_level())["rendered_prompts"]
        for s in settings
    ]
    assert len(set(digests)) == len(settings)


def test_text_settings_only_affect_the_identity_of_text_tasks(tmp_path, mini, tokenizer):
    config = corpus(tmp_path, STORIES)
    rows = tasks.load_rows(config, "train")
    plain = tasks.identity(config, rows, tokenizer)
    for field in dataclasses.fields(TextConfig):
        changed = dataclasses.replace(
            config, text=dataclasses.replace(config.text, **{field.name: "7"})
        )
        different = tasks.identity(changed, rows, tokenizer)
        assert {n for n in plain if plain[n] != different[n]} == {f"text_{field.name}"}
    other = mini("arc_easy")
    assert not any(
        "text_" in name
        for name in tasks.identity(other, tasks.load_rows(other, "train"), tokenizer)
    )


# Unusable data


@pytest.mark.parametrize(
    ("task", "settings", "split", "problem"),
    [
        ("arc", {}, "train", "Unknown task 'arc'.*arc_easy, arc_challenge, boolq"),
        ("boolq", {}, "test", r"no test split \(it has: train, validation\).*--data.dataset"),
        ("arc_easy", {"subset": "X"}, "train", r"'X'.*'ARC-Easy'.*--data.subset"),
        ("arc_easy", {"limit": 0}, "train", "--data.limit"),
        ("arc_easy", {"dataset": "no/such/folder"}, "train", "neither a file.*--data.dataset"),
        ("jsonl", {"dataset": "missing.jsonl"}, "train", "neither a file.*--data.dataset"),
        ("jsonl", {"dataset": None}, "train", "needs data.*--data.dataset"),
        ("boolq", {"dataset": None}, "train", "Hub cannot be reached.*--data.dataset"),
        ("boolq", {"dataset": __file__}, "train", "does not read.*--data.dataset"),
    ],
)
def test_missing_data_raises_an_error_with_its_remedy(
    task, settings, split, problem, mini, offline
):
    with pytest.raises(TaskError, match=problem):
        tasks.load_rows(mini(task, **settings), split)


def test_a_missing_column_is_named_in_the_error(mini, shared):
    config = mini("boolq", dataset=str(shared / "data/hub-mini" / ARC), subset="ARC-Easy")
    with pytest.raises(TaskError, match=r"no column 'passage' \(found: id, .*--data.dataset"):
        tasks.load_rows(config, "train")


def test_an_empty_split_or_a_folder_without_data_raises_an_error(tmp_path):
    with pytest.raises(TaskError, match=r"holds no data files.*--data.dataset"):
        tasks.load_rows(own(tmp_path), "train")
    jsonl(tmp_path, "train", [])
    with pytest.raises(TaskError, match=r"train split of .* is empty.*--data.dataset"):
        tasks.load_rows(own(tmp_path), "train")


@pytest.mark.parametrize(
    ("labels", "problem"),
    [(["A", "B"], r"4 options, 2 labels \(A, B\)"), (["A", "B", "C", "D"], None)],
)
def test_every_choice_requires_a_label(labels, problem, mini, tokenizer):
    config = mini("arc_easy", prompt=PromptConfig(labels=labels))
    if problem is None:
        assert len(encode(config, tokenizer).examples) == 32
        return
    with pytest.raises(TaskError, match=rf"Row 1 of the train split.*{problem}.*prompt.labels"):
        encode(config, tokenizer)


# Without access to the Hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache of the loader, with the Hub unreachable."""
    sources._load_hub.cache_clear()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "loader")
    yield tmp_path / "loader"
    sources._load_hub.cache_clear()


@pytest.fixture
def cached_commit(offline, mini):
    """BoolQ in the loader's cache, as if loaded from the Hub at this commit."""
    commit = "0123456789abcdef" * 2 + "01234567"
    loaded = datasets.load_dataset(mini("boolq").dataset)
    folder = Path(loaded["train"].cache_files[0]["filename"]).parent
    shutil.copytree(folder, offline / "google___boolq/default/0.0.0" / commit)
    return commit


@pytest.mark.parametrize("pinned", [True, False])
def test_a_cached_copy_of_a_hub_data_set_is_used_with_its_commit(
    pinned, cached_commit, mini, tokenizer
):
    config = mini("boolq", dataset=None, dataset_revision=cached_commit if pinned else None)
    rows = tasks.load_rows(config, "train")
    assert (rows.dataset, rows.revision) == ("google/boolq", cached_commit)
    assert rows.digest == tasks.load_rows(mini("boolq"), "train").digest
    prompted = dataclasses.replace(config, prompt=PromptConfig(labels=["y", "n"]))
    assert tasks.identity(prompted, rows, tokenizer)["dataset_revision"] == cached_commit


@pytest.mark.parametrize("revision", ["f" * 40, "main"])
def test_a_cached_copy_of_another_commit_is_rejected(revision, cached_commit, mini):
    config = mini("boolq", dataset=None, dataset_revision=revision)
    with pytest.raises(TaskError, match=f"google/boolq at {revision} is cached here. Connect"):
        tasks.load_rows(config, "train")


def test_an_unwritable_loader_cache_raises_a_clear_error(tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist([QUESTION]), tmp_path / "train.parquet")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/cache")
    with pytest.raises(TaskError, match=r"cannot write its cache .*file/cache.*HF_DATASETS_CACHE"):
        tasks.load_rows(own(tmp_path), "train")


def test_a_path_that_the_loader_treats_as_a_pattern_raises_a_clear_error(tmp_path):
    folder = tmp_path / "a[x]b"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([QUESTION]), folder / "train.parquet")
    with pytest.raises(TaskError, match=r"takes for a pattern. Rename the folder"):
        tasks.load_rows(own(folder), "train")
    jsonl(folder, "train", [QUESTION])
    assert len(tasks.load_rows(own(folder), "train").records) == 1
