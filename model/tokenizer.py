"""Text to token ids and back: tokenizer.json (tokenizers) or tokenizer.model (SentencePiece).

Encoding is left to the library that made the file. Decoding is our own and the same for both: each
id stands for fixed bytes, and a text is the bytes of its ids read as UTF-8. Detokenising step by
step is then an incremental UTF-8 decoder, without look-back, that never shows half a character.

Where a directory has both files, tokenizer.json counts, as in transformers; it is run as written. A
tokenizer.model gives SentencePiece's own ids (transformers 5 rebuilds it, differing at spaces).
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken

from draftnorm.model.chat_template import read_chat_template, render_chat_template
from draftnorm.model.config import token_ids

_LARGEST_ID = 2**24  # beyond this a file is taken to be hostile
_ROLES = [f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
# Appended to a SentencePiece model: normalizer_spec.add_dummy_prefix = false (the last field wins).
_NO_PREFIX = b"\x1a\x02\x18\x00"


class TokenizerError(ValueError):
    """A tokenizer that is missing, malformed or not supported; the message is one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Text to ids and back, stop ids and chat prompts of one checkpoint; see load_tokenizer."""

    encoder: Callable[[str, bool], list[int]]  # (text, add special tokens) -> ids
    tokens: list[str]  # the name of each id as the file spells it, "" in gaps
    token_bytes: list[bytes]
    special: frozenset[int]
    drops_space: bool  # the first space of a text is the encoder's own
    roles: dict[str, str]  # "bos_token" -> "<s>" and so on
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """The number of ids. A model's embedding may have more rows, as padding."""
        return len(self.tokens)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of a text, with BOS (and EOS) where the model wants them."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode: {error}") from None
        return self.encoder(text, add_special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids. What is not UTF-8 becomes U+FFFD; padding stands for nothing."""
        decoder = IncrementalDecoder(self, skip_special=skip_special)
        return decoder.push(*ids) + decoder.flush()

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt for messages, each {"role", "content"}, by the checkpoint's chat template."""
        if self.chat_template is None:
            raise TokenizerError("this checkpoint has no chat template")
        text = render_chat_template(self.chat_template, messages, special_tokens=self.roles)
        return self.encode(text, add_special=False)  # a template writes BOS itself


class IncrementalDecoder:
    """Turns ids into text as they come; all its pieces together are `tokenizer.decode(ids)`."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._token_bytes, self._drops_space = tokenizer.token_bytes, tokenizer.drops_space
        self._known = range(len(self._token_bytes))
        self._skipped = tokenizer.special if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, *ids: int) -> str:
        """The text that these ids make certain; "" inside a character."""
        kept = [self._token_bytes[i] for i in ids if i in self._known and i not in self._skipped]
        return self._emit(self._utf8.decode(b"".join(kept)))

    def flush(self) -> str:
        """The end of the text: U+FFFD if a character was left incomplete."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory in Hugging Face layout.

    Stop ids are the union of eos_token_id in generation_config.json and config.json; where neither
    has one, the tokenizer's EOS token. Raises TokenizerError, ConfigError or ChatTemplateError.
    """
    directory = Path(path)
    settings = _read_json(directory / "special_tokens_map.json")
    settings |= _read_json(directory / "tokenizer_config.json")
    if (file := directory / "tokenizer.json").is_file():
        tokenizer = _load_tokenizers(file, settings)
    elif (file := directory / "tokenizer.model").is_file():
        tokenizer = _load_sentencepiece(file, settings)
    else:
        raise TokenizerError(f"{path} has neither tokenizer.json nor tokenizer.model")
    configs = [_read_json(directory / f) for f in ("generation_config.json", "config.json")]
    stops = {stop for config in configs for stop in token_ids(config.get("eos_token_id"))}
    bos, eos = (
        tokenizer.tokens.index(tokenizer.roles[role]) if role in tokenizer.roles else None
        for role in ("bos_token", "eos_token")
    )
    return replace(
        tokenizer,
        bos_token_id=bos,
        eos_token_ids=tuple(sorted(stops)) or token_ids(eos),
        chat_template=read_chat_template(directory, settings),
    )


def _load_tokenizers(file: Path, settings: Mapping[str, Any]) -> Tokenizer:
    roles, added = _roles(file, settings, {}), _added_tokens(file, settings)
    try:
        library = tokenizers.Tokenizer.from_file(str(file))
        library.no_truncation()
        library.no_padding()
        library.add_tokens([token for _, token in sorted(added.items())])
        library.add_special_tokens([AddedToken(t, normalized=False) for t in roles.values()])
        added = library.get_added_tokens_decoder()
        decoder = json.loads(library.decoder.__getstate__()) if library.decoder else {}
    except Exception as error:  # tokenizers raises nothing narrower
        raise TokenizerError(f"{file} cannot be read: {error}") from None
    steps = {step.get("type"): step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        to_bytes = _byte_level
    elif steps.keys() <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        to_bytes = _spaced
    else:
        raise TokenizerError(f"{file}: decoder {list(steps)} is not supported")
    tokens = _by_id(library.get_vocab(), file)
    token_bytes = [to_bytes(token) for token in tokens]
    for index, token in added.items():
        token_bytes[index] = token.content.encode()
    prefix = steps.get("Metaspace", {}).get("prepend_scheme", "never")
    return Tokenizer(
        encoder=lambda text, special: library.encode(text, add_special_tokens=special).ids,
        tokens=tokens,
        token_bytes=token_bytes,
        special=frozenset(index for index, token in added.items() if token.special),
        drops_space="Strip" in steps or prefix != "never",
        roles=roles,
    )


def _load_sentencepiece(file: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Special and added tokens are cut out of a text, the sections between them encoded alone.

    Unless `legacy` is false, every section, not only one at the very start, gets the prefix space
    that the model's settings ask for. This default and add_bos_token's are transformers 4's.
    """
    try:
        if not (model := file.read_bytes()):
            raise RuntimeError("it is empty")
        library = SentencePieceProcessor(model_proto=model)
        inner = library
        if settings.get("legacy") is False:
            inner = SentencePieceProcessor(model_proto=model + _NO_PREFIX)
        tokens = [library.id_to_piece(i) for i in range(library.vocab_size())]
    except (OSError, RuntimeError, UnicodeError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from None
    own = {"bos_token": library.bos_id(), "eos_token": library.eos_id()}
    own = {role: tokens[i] for role, i in (own | {"unk_token": library.unk_id()}).items() if i >= 0}
    roles, added = _roles(file, settings, own), _added_tokens(file, settings)
    ids = {token: index for index, token in enumerate(tokens)}
    ids |= {token.content: index for index, token in added.items()}
    for token in roles.values():
        index = ids.setdefault(token, max(ids.values(), default=-1) + 1)
        added.setdefault(index, AddedToken(token, special=True))
    tokens = _by_id(ids, file)
    token_bytes = [_spaced(token) for token in tokens]
    for index, token in added.items():
        token_bytes[index] = token.content.encode()
    by_length = sorted(added.values(), key=lambda token: -len(token.content))
    cut = re.compile("|".join(map(_pattern, by_length)) or "(?!)")  # "(?!)" matches nowhere
    ends = [("add_bos_token", "bos_token", True), ("add_eos_token", "eos_token", False)]
    before, after = (
        [ids[roles[role]]] if role in roles and settings.get(key, default) else []
        for key, role, default in ends
    )

    def encode(text: str, special: bool) -> list[int]:
        found, start = [], 0
        for match in cut.finditer(text):
            section = text[start : match.start()]
            found += (inner if start else library).encode(section)
            found.append(ids[match[match.lastindex]])
            start = match.end()
        found += (inner if start else library).encode(text[start:])
        return [*before, *found, *after] if special else found

    return Tokenizer(
        encoder=encode,
        tokens=tokens,
        token_bytes=token_bytes,
        special=frozenset(index for index, token in added.items() if token.special)
        | {i for i in range(library.vocab_size()) if library.is_control(i)},
        drops_space=library.normalize("a") != "a",
        roles=roles,
    )


def _pattern(token: AddedToken) -> str:
    """Matches an added token, with the white space that it swallows."""
    return r"\s*" * token.lstrip + f"({re.escape(token.content)})" + r"\s*" * token.rstrip


def _roles(file: Path, settings: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, str]:
    """The named special tokens of the settings, `own` where they do not say."""
    roles = {}
    for role in _ROLES:
        token = settings.get(role, own.get(role))
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not (isinstance(token, str) and token):
            raise TokenizerError(f"{file}: the settings' {role} is {token!r}, not a text")
        roles |= {role: token} if token else {}
    return roles


def _added_tokens(file: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the model's own, by id: added_tokens_decoder, else added_tokens.json."""
    try:
        if "added_tokens_decoder" in settings:
            listed = settings["added_tokens_decoder"].items()
            added = {int(index): AddedToken(**fields) for index, fields in listed}
        else:
            listed = _read_json(file.parent / "added_tokens.json").items()
            added = {int(index): AddedToken(token, normalized=False) for token, index in listed}
        if not all(token.content for token in added.values()):
            raise ValueError("an empty one")
        return added
    except (TypeError, ValueError, AttributeError) as error:
        raise TokenizerError(f"{file}: malformed list of added tokens: {error}") from None


def _by_id(ids: Mapping[str, int], file: Path) -> list[str]:
    if not ids or min(ids.values()) < 0 or max(ids.values()) > _LARGEST_ID:
        raise TokenizerError(f"{file}: it has no tokens, or ids beyond 0 … {_LARGEST_ID}")
    tokens = [""] * (max(ids.values()) + 1)
    for token, index in ids.items():
        tokens[index] = token
    return tokens


def _spaced(token: str) -> bytes:
    """The bytes of a SentencePiece token: "▁" is a space, "<0x0A>" one byte."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _byte_level(token: str) -> bytes:
    """The bytes of a GPT-2 token, which spells each byte as one printable character."""
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()


# GPT-2's spelling: what prints in Latin-1 stands for itself, the other bytes begin at U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(0x100 + i): b for i, b in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file} does not hold a JSON object")
    return content
