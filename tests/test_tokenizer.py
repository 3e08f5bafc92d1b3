"""Tokenizers: ids equal the library that made the file, and text comes out piece by piece whole."""

import importlib.util
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors

from draftnorm.model.config import ConfigError
from draftnorm.model.tokenizer import IncrementalDecoder, TokenizerError, load_tokenizer

FETCHED = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m"
CORPUS = [
    "the cat sat on the mat",
    "def f(x):\n\treturn x + 1",
    "naïve café, déjà vu",
    "日本語 text",
] * 9
EOS = {"__type": "AddedToken", "content": "</s>"}
TEXTS = [
    "",
    " ",
    "Hello world",
    " two  spaces and   three ",
    "line\n\nbreaks\r\n\ttabs",
    "don't stop: 12345 + 6.78e-9",
    "emoji 🙂👩‍👩‍👧🏽 and flags 🇩🇪",
    "中文、日本語。한국어",
    "e\u0301 combining, a\u0308\u0323",
    "a\x04b\x00c",
    "﷽ ▁ literal ▁▁",
    "<s> not special </s>?",
]


def write_json(directory: Path, **files: dict) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    """A tiny Llama-like model: BPE, byte fallback, dummy prefix, no normalisation."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 9), model_writer=out, model_type="bpe", vocab_size=340,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.98,
        minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture
def spm(tmp_path, sentencepiece_model) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    return tmp_path, sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)


@pytest.fixture
def byte_level(tmp_path) -> Path:
    """A tiny GPT-2-like tokenizer.json that adds BOS, with a special and an added token."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS * 9, trainer)
    library.add_tokens([AddedToken("<tool é>", normalized=False)])
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(3)
    library.enable_padding(length=9, pad_id=1, pad_token="</s>")
    library.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": EOS})
    return tmp_path


# tokenizer.json


def test_ids_and_text_equal_transformers(byte_level):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(byte_level)
    ours = load_tokenizer(byte_level)
    assert ours.tokens == reference.convert_ids_to_tokens(range(len(reference)))
    assert ours.bos_token_id == reference.bos_token_id == 0
    for text in [*TEXTS, *CORPUS, "<s><tool é></s> x"]:
        for special in (True, False):
            ids = ours.encode(text, add_special=special)
            assert ids == reference.encode(text, add_special_tokens=special)
        assert ours.decode(ids) == text
        assert ours.decode(ours.encode(text), skip_special=True) == text.replace("<s>", "").replace(
            "</s>", ""
        )


@pytest.mark.skipif(not FETCHED.is_dir(), reason="draftnorm fetch smollm2-135m was not run")
def test_smollm2_equals_transformers_and_its_published_pre_tokenizer():
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(FETCHED)
    ours = load_tokenizer(FETCHED)
    code = Path(__file__).read_text(encoding="utf-8")
    for text in [*TEXTS, code, "<|im_start|>user\nhi<|im_end|>\n", "x<|endoftext|> y"]:
        ids = ours.encode(text)
        assert ids == reference.encode(text)
        assert ours.decode(ids) == reference.decode(ids)
    assert len(ours.encode("12345")) == 5  # single digits
    assert ours.encode("a\x04b") == ours.encode("a") + ours.encode("b")  # a byte it does not know
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(messages) == expected
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (49152, 1, (2,))


def test_tokens_that_only_the_configuration_names_are_added(byte_level):
    size = load_tokenizer(byte_level).vocab_size
    added = {str(size): {"content": "<x>", "special": True, "normalized": False}}
    write_json(byte_level, tokenizer_config={"pad_token": "<p>", "added_tokens_decoder": added})
    ours = load_tokenizer(byte_level)
    assert ours.encode("<p>a<x>", add_special=False)[::2] == [size + 1, size]
    assert ours.decode([size, 65, size + 1], skip_special=True) == ours.decode([65])


def test_metaspace_and_byte_fallback_decoders(tmp_path):
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "<0xC3>": 4, "<0xA9>": 5, "<0x20>": 6}
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    for decoder in (library.decoder, decoders.Sequence(steps)):
        library.decoder = decoder
        library.save(str(tmp_path / "tokenizer.json"))
        ours = load_tokenizer(tmp_path)
        for ids in ([3, 3], [1, 3], [4, 5, 2], [2], [6, 6]):
            assert ours.decode(ids) == library.decode(ids)


# tokenizer.model


def test_sentencepiece_ids_are_the_librarys(spm):
    directory, reference = spm
    ours = load_tokenizer(directory)
    assert ours.vocab_size == reference.vocab_size()
    assert ours.tokens == [reference.id_to_piece(i) for i in range(reference.vocab_size())]
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    for text in TEXTS[:-1] + CORPUS:
        ids = reference.encode(text)
        assert ours.encode(text) == [1, *ids]  # BOS is the default
        assert ours.encode(text, add_special=False) == ids
        assert ours.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("legacy", [None, True, False])
def test_special_tokens_cut_the_text(spm, legacy):
    directory, reference = spm
    added = {
        "340": {"content": "<|im_end|>", "rstrip": True, "special": True},
        "342": {"content": "<x"},
    }
    config = {"legacy": legacy, "add_bos_token": False, "add_eos_token": True}
    write_json(directory, tokenizer_config=config | {"added_tokens_decoder": added})
    ours = load_tokenizer(directory)
    assert ours.vocab_size == 343 and ours.tokens[341] == ""
    # Without legacy only the text's start has the prefix space, which is what "cat" alone lacks.
    cat = reference.encode("cat")
    bare = cat if legacy is not False else [reference.piece_to_id(p) for p in ("c", "at")]
    assert ours.encode("cat<s>cat<|im_end|>  cat<x") == [*cat, 1, *bare, 340, *bare, 342, 2]
    assert ours.decode([340, *cat, 342, 341, 999]) == "<|im_end|> cat<x"
    assert ours.decode([1, *cat, 340, 2], skip_special=True) == "cat"


def test_added_tokens_file_and_new_named_tokens(spm):
    directory, _ = spm
    write_json(directory, added_tokens={"<a>": 340}, special_tokens_map={"pad_token": "<pad>"})
    ours = load_tokenizer(directory)
    assert ours.encode("<a><pad>", add_special=False) == [340, 341]
    assert ours.roles["pad_token"] == "<pad>"


def test_a_model_without_named_tokens_is_encoded_as_it_is(spm):
    directory, reference = spm
    write_json(directory, tokenizer_config=dict.fromkeys(("bos_token", "eos_token", "unk_token")))
    assert load_tokenizer(directory).encode("<s>cat</s>") == reference.encode("<s>cat</s>")


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_equals_transformers_where_it_follows_the_model(spm, legacy):
    """transformers 5 rebuilds the model as BPE over ranks and gives no prefix space to a text that
    starts with a space, so that only texts without runs of spaces can be compared."""
    transformers = pytest.importorskip("transformers")
    directory, reference = spm
    write_json(directory, tokenizer_config={"legacy": legacy, "add_eos_token": True})
    pieces = [reference.id_to_piece(i) for i in range(reference.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (-reference.get_score(i), ids[piece[:cut]], ids[piece[cut:]], piece, cut)
        for i, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    theirs = transformers.LlamaTokenizer(
        vocab=ids, merges=[(piece[:cut], piece[cut:]) for *_, piece, cut in sorted(merges)],
        legacy=legacy, add_bos_token=True, add_eos_token=True,
    )  # fmt: skip
    ours = load_tokenizer(directory)
    for text in ["Hello world", "the cat sat<s>on the mat</s>", "naïve 🙂 café", "a\x04b\n日本語"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def mistral_model() -> bytes:
    """Mistral 7B's SentencePiece file, out of a package that is not imported (it has needs)."""
    if (package := importlib.util.find_spec("mistral_common")) is None:
        pytest.skip("pip install --no-deps mistral-common")
    return Path(package.origin).with_name("data").joinpath("tokenizer.model.v1").read_bytes()


def test_mistrals_sentencepiece_file(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(mistral_model())
    reference = sentencepiece.SentencePieceProcessor(model_proto=mistral_model())
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 32000
    for text in TEXTS[:-1] + CORPUS:
        assert ours.encode(text, add_special=False) == reference.encode(text)
        assert ours.decode(ours.encode(text), skip_special=True) == text.replace("▁", " ")


def test_tokenizer_json_comes_before_tokenizer_model(byte_level, sentencepiece_model):
    expected = load_tokenizer(byte_level).tokens
    (byte_level / "tokenizer.model").write_bytes(sentencepiece_model)
    assert load_tokenizer(byte_level).tokens == expected


# Incremental decoding


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_make_up_the_text_and_hold_whole_characters(kind, skip_special, request):
    directory = request.getfixturevalue("byte_level" if kind == "byte level" else "spm")
    tokenizer = load_tokenizer(directory if kind == "byte level" else directory[0])
    rng = random.Random(0)
    sequences = [tokenizer.encode(text) for text in TEXTS]
    sequences += [ids[: len(ids) // 2] for ids in sequences]  # cut off, often inside a character
    sequences += [rng.choices(range(tokenizer.vocab_size + 5), k=40) for _ in range(60)]
    for ids in sequences:
        decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
        pieces = [decoder.push(token) for token in ids]
        assert "".join([*pieces, decoder.flush()]) == tokenizer.decode(
            ids, skip_special=skip_special
        )


def test_a_character_appears_at_once_and_a_truncated_one_at_the_end(byte_level):
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode("🙂", add_special=False)
    assert len(ids) == 4
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(token) for token in ids] == ["", "", "", "🙂"]
    assert [decoder.push(token) for token in ids[:3]] == ["", "", ""]
    assert decoder.flush() == "\ufffd"
    decoder.push(ids[0])
    assert decoder.push(*tokenizer.encode("a", add_special=False)) == "\ufffda"


# Stop ids, chat, errors


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (7, 9, (7, 9)),
        ([9, 3], [3, 5], (3, 5, 9)),
        (None, 5, (5,)),
        (4, None, (4,)),
        (None, None, (1,)),  # the tokenizer's own </s>
    ],
)
def test_stop_ids_are_a_union(byte_level, generation, config, expected):
    write_json(byte_level, generation_config={"eos_token_id": generation})
    write_json(byte_level, config={"eos_token_id": config})
    assert load_tokenizer(byte_level).eos_token_ids == expected


def test_chat_has_one_bos(byte_level):
    with pytest.raises(TokenizerError, match="no chat template"):
        load_tokenizer(byte_level).encode_chat([])
    (byte_level / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ messages[0].content }}{{ '!' if add_generation_prompt }}"
    )
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    assert ids.count(0) == 1 and tokenizer.decode(ids) == "<s>the cat!"


def test_lone_surrogates_are_refused(byte_level, spm):
    for directory in (byte_level, spm[0]):
        with pytest.raises(TokenizerError, match="not valid Unicode"):
            load_tokenizer(directory).encode("a\ud800")


def break_json(directory: Path, name: str, content: str) -> Path:
    (directory / name).write_text(content)
    return directory


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"bos_token": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": ""}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("added_tokens.json", '{"a": "b"}'),
        ("config.json", "{,}"),
    ],
)
def test_malformed_files_are_one_line(byte_level, name, content):
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(break_json(byte_level, name, content))
    assert "\n" not in str(caught.value) and str(byte_level) in str(caught.value)


def test_other_failures_are_one_line(tmp_path, byte_level, sentencepiece_model):
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="token ids must be"):
        load_tokenizer(break_json(byte_level, "config.json", '{"eos_token_id": "x"}'))
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a"))
    library.decoder = decoders.WordPiece()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"WordPiece.* is not supported"):
        load_tokenizer(tmp_path)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.decoder = decoders.ByteLevel()
    (tmp_path / "empty").mkdir()
    library.save(str(tmp_path / "empty" / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="it has no tokens"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").unlink()
    for size in (0, 1, 10, len(sentencepiece_model) // 2, len(sentencepiece_model) - 1):
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model[:size])
        with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)
