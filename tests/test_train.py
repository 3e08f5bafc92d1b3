"""The commands that train, from text to a pair that speculates: the preset `tiny`, on a CPU."""

import json

from draftnorm import load_model, load_tokenizer, speculate
from draftnorm.scripts import train
from draftnorm.scripts.main import main


def test_an_evaluation_is_shown_even_if_it_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "evaluate_pair", lambda *_: {"bits": 0.9})
    assert main(["train", "evaluate", "--out", str(tmp_path / "nowhere" / "file")]) == 1
    assert json.loads(capsys.readouterr().out) == {"bits": 0.9}


def test_a_draft_that_cannot_be_is_known_before_the_target_writes_for_it(
    make_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "_generate", None)
    (tmp_path / "train.bin").write_bytes(bytes(20_000))
    argv = ["train", "draft", "--target", str(make_checkpoint()), "--corpus", str(tmp_path)]
    assert main([*argv, "--device", "cpu", "--hidden-size", "32"]) == 1
    assert "hidden_size=32 is not a multiple of 64" in capsys.readouterr().err


def test_the_tiny_preset_from_text_to_speculation(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split, count in (("train", 400), ("validation", 40), ("prompts", 4)):
        with (corpus / f"{split}.jsonl").open("w") as output:
            for i in range(count):
                names = [f"{split}_{i}_{j}" for j in range(12)]
                text = "".join(
                    f"def {n}(x):\n    return {n[::-1]}(x, {i * j})\n\n\n"
                    for j, n in enumerate(names)
                )
                output.write(json.dumps({"package": "p", "path": f"{i}.py", "text": text}) + "\n")
    folders = ["--corpus", str(corpus)]
    target, draft = tmp_path / "target", tmp_path / "draft"
    options = ["--device", "cpu", *folders]
    assert main(["train", "tokenizer", *folders, "--vocab-size", "320"]) == 0
    tokenizer, ids = tmp_path / "kept.model", (corpus / "train.bin").read_bytes()
    (corpus / "tokenizer.model").rename(tokenizer)
    assert main(["train", "tokenizer", *folders, "--tokenizer", str(tokenizer)]) == 0
    assert (corpus / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert (corpus / "train.bin").read_bytes() == ids
    assert main(["train", "target", "--preset", "tiny", "--out", str(target), *options]) == 0
    history = json.loads((target / "history.json").read_text())
    assert history["history"][-1]["loss"] < 0.7 * history["history"][0]["loss"]
    assert history["validation"]["nats_per_token"] < 5.0  # 6.2 is uniform
    distil = ["--hidden-size", "64", "--steps", "30", "--batch-size", "8", "--generate", "16"]
    command = ["train", "draft", "--target", str(target), "--out", str(draft), *distil, *options]
    assert main(command) == 0
    assert (target / "loss.png").is_file() and "tokens_per_second" in capsys.readouterr().err

    prompt = "def train_1_1(x):\n    return"
    result = speculate(
        load_model(target, device="cpu"),
        load_tokenizer(target),
        prompt,
        draft=load_model(draft, device="cpu"),
        draft_tokenizer=load_tokenizer(draft),
        draft_length=2,
        max_new_tokens=32,
    ).result()
    assert result.speculation.accepted > 0
