"""Chat templates: a checkpoint's Jinja text that turns messages into the prompt it was trained on.

A template is a program from elsewhere. It runs in Jinja's immutable sandbox (no access to Python's
internals, no changes to what it is given) and within a budget of loop steps and calls. Otherwise
the environment is the one that transformers defines: same template and messages, same text.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000  # of one rendering; a long chat takes some thousands


class ChatTemplateError(ValueError):
    """A template that is malformed, leaves its sandbox or refuses the messages; one line."""


def read_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template's text: chat_template.jinja, else tokenizer_config.json's entry, else None.

    The entry is a text, or a list of named ones, of which "default" is taken.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateError(f"{file} cannot be read: {error}") from None
    entry = tokenizer_config.get("chat_template")
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default", entry)
    if entry is not None and not isinstance(entry, str):
        raise ChatTemplateError(f"{directory}: chat_template is no text and has no 'default'")
    return entry


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> str:
    """The prompt for `messages`, each {"role": ..., "content": ...}.

    `special_tokens` names bos_token, eos_token and so on, as far as the tokenizer has them. Raises
    ChatTemplateError whatever goes wrong in the template.
    """
    environment = _Environment()
    try:
        tree = environment.parse(template)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
        return environment.from_string(tree).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except Exception as error:  # foreign code can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ChatTemplateError(f"the chat template failed: {reason}") from None


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, for one rendering, whose loops, calls and powers are bounded."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        self.steps = 0
        self.filters |= {"tojson": _to_json, "counted": self._counted}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateError(f"it did not end within {MAX_STEPS} steps")

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self._step()
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        text, count = (left, right) if isinstance(left, Sized) else (right, left)
        repeats = isinstance(text, Sized) and isinstance(count, int)
        if operator == "**" or (repeats and count > 1000):
            raise TemplateError(f"{operator!r} would make too large a value")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; here its body is just rendered."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Plain JSON: Jinja's own filter escapes HTML's characters. `layout` is indent, separators …"""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
