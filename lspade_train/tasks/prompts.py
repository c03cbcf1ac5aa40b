"""Turns questions into prompt texts: template, solved examples, chat format."""

from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

from lspade_train.errors import TaskError
from lspade_train.recipe import PromptConfig
from lspade_train.tasks.base import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Variables that some chat templates read besides the messages; others ignore them. A model that
# thinks first would not answer with its next token, and today's date would change the prompt. (A
# template that calls `strftime_now` still uses the clock, which is why the rendered prompts are
# part of a cache's identity.)
CHAT_VARIABLES: dict[str, Any] = {
    "enable_thinking": False,
    "date_string": "26 Jul 2024",
}


# Exceptions that a template's Python expressions may raise.
TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class Prompter:
    """Renders the prompt of a question.

    Args:
        config: template, chat format and number of solved examples.
        template: the task's own template, used if `config` has none.
        tokenizer: the model's tokenizer, for its chat template.
        shots: labelled questions to draw solved examples from, one more than a prompt shows.

    Raises:
        TaskError: the chat settings contradict each other, or there is no chat template.
    """

    def __init__(
        self,
        config: PromptConfig,
        template: str,
        tokenizer: "PreTrainedTokenizerBase",
        shots: Sequence[Question],
    ) -> None:
        if not config.chat and (config.system or config.chat_template):
            raise TaskError(
                "data.prompt.system and data.prompt.chat_template belong to chat prompts. "
                "Add --data.prompt.chat true, or write the text into --data.prompt.template."
            )
        if config.chat and not (config.chat_template or tokenizer.chat_template):
            raise TaskError(
                "The model's tokenizer has no chat template. Set --data.prompt.chat false, or "
                "give one with data.prompt.chat_template."
            )
        self.config = config
        self.template = config.template or template
        self.tokenizer = tokenizer
        self.shots = shots

    def __call__(self, question: Question, prefix: str) -> str:
        """The prompt, ending where `prefix` and the answer would follow.

        The question itself is never used as a solved example.
        """
        others = [shot for shot in self.shots if shot.stem != question.stem]
        shown = [
            (fill(self.template, shot.fields), shot.answer or "")
            for shot in others[: self.config.shots]
        ]
        asked = fill(self.template, question.fields)
        if self.config.chat:
            return self._chat(shown, asked)
        return "\n\n".join([*(text + prefix + answer for text, answer in shown), asked])

    def _chat(self, shown: Sequence[tuple[str, str]], asked: str) -> str:
        import jinja2

        messages = [{"role": "system", "content": self.config.system}] if self.config.system else []
        for text, answer in shown:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": asked})
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.config.chat_template,
                tokenize=False,
                add_generation_prompt=True,
                **CHAT_VARIABLES,
            )
        except (jinja2.TemplateError, *TEMPLATE_FAULTS) as error:
            raise TaskError(
                f"The chat template refuses the prompt: {error}. Leave out what it does not know "
                "(data.prompt.system), or give another with data.prompt.chat_template."
            ) from error
        return str(text)


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Fill a template with a question's fields.

    Raises:
        TaskError: the template is not a format string, or uses an unknown field.
    """
    known = ", ".join(f"{{{name}}}" for name in fields)
    try:
        unknown = [name for name in _names(template) if name not in fields]
        if not unknown:
            return template.format_map(fields)
    except ValueError as error:
        raise TaskError(
            f"The template is not a format string: {error}. Double the braces that are text, as "
            f"in {{{{; fields are {known}. Set --data.prompt.template."
        ) from error
    raise TaskError(
        f"The template names {{{unknown[0]}}}, which the task does not have. "
        f"Set --data.prompt.template with fields out of {known}."
    )


def _names(template: str) -> Iterator[str]:
    """The fields that a format string uses, including those in format specifications."""
    for _, name, specification, _ in Formatter().parse(template):
        if name is not None:
            yield name
            yield from _names(specification or "")
