"""A corpus as fixed blocks of token ids, and the tokenizer learnt from it.

A corpus is a folder: manifest.json says where the text is from; <split>.jsonl has a line
{"package", "path", "text"} a file; after `tokenise`, <split>.bin has the uint16 token ids, every
file as <s> text </s>. Whole packages are held out: "validation" measures, "prompts" begins
completions, "train" is the rest. scripts/collect_corpus.py makes the first two from what is
installed.

Shapes: B sequences, T tokens.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

SPLITS = ("train", "validation", "prompts")


def read_split(corpus: Path, split: str) -> Iterator[dict]:
    """The records {"package", "path", "text"} of one split."""
    with (corpus / f"{split}.jsonl").open() as lines:
        yield from map(json.loads, lines)


def _encode(tokenizer_file: str, texts: list[str]) -> np.ndarray:
    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer_file)
    ids = processor.encode(texts, add_bos=True, add_eos=True)
    return np.fromiter((token for file in ids for token in file), dtype=np.uint16)


def tokenise(corpus: Path, split: str, tokenizer_file: Path) -> int:
    """Write <split>.bin from <split>.jsonl; return its number of tokens (≤ 65,536 pieces)."""
    texts = [record["text"] for record in read_split(corpus, split)]
    # A fixed shuffle of files: neighbouring blocks then come from unrelated packages.
    order = np.random.Generator(np.random.Philox(0)).permutation(len(texts))
    batches = [[texts[i] for i in order[at : at + 64]] for at in range(0, len(texts), 64)]
    total = 0
    with ProcessPoolExecutor() as pool, (corpus / f"{split}.bin").open("wb") as output:
        for tokens in pool.map(partial(_encode, str(tokenizer_file)), batches):
            output.write(tokens.tobytes())
            total += len(tokens)
    return total


@dataclass(frozen=True, slots=True)
class TokenBlocks:
    """A memory-mapped token file as blocks of `size` tokens, each with the one that follows it."""

    tokens: np.memmap
    size: int

    @classmethod
    def open(cls, path: Path, size: int) -> "TokenBlocks":
        tokens = np.memmap(path, dtype=np.uint16, mode="r") if path.stat().st_size else ()
        if len(tokens) <= size:
            raise ValueError(f"{path} holds {len(tokens)} tokens, too few for one block of {size}")
        return cls(tokens, size)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.size

    def __getitem__(self, block: int) -> Tensor:
        start = block * self.size
        return torch.from_numpy(self.tokens[start : start + self.size + 1].astype(np.int64))

    def batch(self, step: int, batch_size: int, *, seed: int) -> Tensor:
        """int64 [B, T + 1]: a pure function of (step, seed), so a resumed run sees the same data.

        Every epoch is a new permutation of the blocks; what does not fill a batch waits.
        """
        if len(self) < batch_size:
            raise ValueError(f"{len(self)} blocks do not fill a batch of {batch_size}")
        epoch, place = divmod(step, len(self) // batch_size)
        order = _order(len(self), seed, epoch)[place * batch_size : (place + 1) * batch_size]
        return torch.stack([self[block] for block in order])


@lru_cache(maxsize=16)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` blocks. Kept: drawing it anew takes a millisecond of every step."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def train_tokenizer(corpus: Path, out: Path, *, vocab_size: int = 8192, max_bytes: int) -> Path:
    """Train the SentencePiece BPE model out/tokenizer.model on a sample of the training split.

    Nothing is normalised and no space is added or dropped, so decode(encode(text)) == text for any
    text without U+2581 and NUL; bytes stand for characters without a piece.
    Raises ValueError if the text is too little for `vocab_size` pieces.
    """
    records = list(read_split(corpus, "train"))
    order = np.random.Generator(np.random.Philox(1)).permutation(len(records))

    def pieces() -> Iterator[str]:
        size = 0
        for i in order:
            # Sentences of four lines with line ends inside, so that merges like "):\n" are learnt;
            # the trainer strips line ends from a sentence's end, not from its start.
            lines = records[i]["text"].split("\n")
            for at in range(0, len(lines), 4):
                yield "\n" + "\n".join(lines[at : at + 4])
            size += len(records[i]["text"])
            if size > max_bytes:
                return

    out.mkdir(parents=True, exist_ok=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces(),
            model_prefix=str(out / "tokenizer"),
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=16_384,
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces from this text: {error}") from None
    (out / "tokenizer.vocab").unlink()
    return out / "tokenizer.model"
