"""Chat templates: equal to transformers on real models' texts, contained on hostile ones.

tests/data/chat_templates holds the templates that the named models publish in their configurations.
"""

import json
from pathlib import Path

import pytest

from draftnorm.model.chat_template import (
    ChatTemplateError,
    read_chat_template,
    render_chat_template,
)

TEMPLATES = sorted((Path(__file__).parent / "data" / "chat_templates").glob("*.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
USER = {"role": "user", "content": "  What is <b>2 + 2</b> & why? 🙂\n"}
SYSTEM = {"role": "system", "content": "Be brief. "}
ASSISTANT = {"role": "assistant", "content": "<think>\nadd\n</think>\n\nIt's 4."}
CALL = {"function": {"name": "add", "arguments": {"a": "é", "b": [2, True]}}}
CONVERSATIONS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "three turns": [USER, ASSISTANT, USER],
    "system, five turns": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER],
    "answered": [USER, ASSISTANT],
    "two users": [USER, USER],
    "tool": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
             {"role": "tool", "content": "4 < 5"}, ASSISTANT],
}  # fmt: skip


def render(template: str, messages: list, prompt: bool = True) -> str:
    return render_chat_template(
        template, messages, special_tokens=SPECIAL, add_generation_prompt=prompt
    )


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "<unk>": 2}, []))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, **SPECIAL)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_text_equals_transformers(template, conversation, prompt, reference):
    text, messages = template.read_text(), CONVERSATIONS[conversation]
    options = {"chat_template": text, "tokenize": False, "add_generation_prompt": prompt}
    try:
        expected = reference.apply_chat_template(messages, **options)
    except Exception as error:
        with pytest.raises(ChatTemplateError, match="the chat template failed") as ours:
            render(text, messages, prompt)
        assert str(error) in str(ours.value)
    else:
        assert render(text, messages, prompt) == expected


def test_at_least_six_real_templates_were_compared():
    assert len(TEMPLATES) >= 6


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a\n{% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
        ("{% for m in messages %}{% if m.n %}{% break %}{% endif %}{% endfor %}.", "."),
        ("{{ {'k': '<é>'} | tojson }}", '{"k": "<é>"}'),
        ("{{ {'k': 1} | tojson(indent=2) }}", '{\n  "k": 1\n}'),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{{ tools is none }}{{ pad_token is defined }}", "TrueFalse"),
        ("{{ 'ab' * 2 }}{{ 3 * 2 }}", "abab6"),
    ],
)
def test_environment(template, expected):
    assert render(template, [USER]) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__.json }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id') }}", "unsafe"),
        ("{% include 'secrets' %}", "no loader"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        (
            "{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}",
            "steps",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "too large"),
        ("{{ 'x' * 99999999999 }}", "too large"),
        ("{{ 99999999999 * [0] }}", "too large"),
        ("{% for x %}", "expected token"),
        ("{{ raise_exception('no\nsystem role') }}", "no system role"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_hostile_or_failing_template_is_one_line(template, reason, monkeypatch):
    monkeypatch.setattr("draftnorm.model.chat_template.MAX_STEPS", 10_000)
    with pytest.raises(ChatTemplateError, match=reason) as caught:
        render(template, [USER])
    assert "\n" not in str(caught.value)


def test_the_file_comes_before_the_configuration_and_default_is_chosen(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert read_chat_template(tmp_path, {}) is None
    assert read_chat_template(tmp_path, {"chat_template": "S"}) == "S"
    assert read_chat_template(tmp_path, {"chat_template": named}) == "D"
    (tmp_path / "chat_template.jinja").write_text("F é", encoding="utf-8")
    assert read_chat_template(tmp_path, {"chat_template": "S"}) == "F é"


@pytest.mark.parametrize("entry", [7, ["x"], [{"name": "tool_use", "template": "T"}], {"a": 1}])
def test_a_template_entry_without_text_is_refused(tmp_path, entry):
    with pytest.raises(ChatTemplateError, match="has no 'default'"):
        read_chat_template(tmp_path, json.loads(json.dumps({"chat_template": entry})))
