"""Train a small target and its draft: `draftnorm train corpus | tokenizer | target | draft`.

    draftnorm train corpus                     # Python source of what is installed -> runs/corpus
    draftnorm train tokenizer                  # SentencePiece model, then token ids of every split
    draftnorm train target --preset target     # -> runs/target, a checkpoint
    draftnorm train draft                      # distilled from runs/target -> runs/draft
    draftnorm train evaluate                   # both on held-out text -> runs/evaluation.json

A target or draft folder holds, beside the checkpoint, state.safetensors (a run that was killed and
is started again with the same arguments goes on from there), history.json and loss.png.
"""

if __name__ == "__main__":
    from as_file import run_as_file

    run_as_file("train")

import argparse
import json
import shutil
import site
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from draftnorm.decoding.distillation import (
    DRAFT,
    MixedBlocks,
    continuations,
    distillation_loss,
    draft_config,
)
from draftnorm.model.checkpoint import load_model, resolve_placement, save_model
from draftnorm.model.config import ModelConfig
from draftnorm.model.corpus import SPLITS, TokenBlocks, tokenise, train_tokenizer
from draftnorm.model.training import (
    PRESETS,
    Loss,
    TrainingConfig,
    evaluate,
    next_token_loss,
    train,
)
from draftnorm.model.transformer import Transformer
from draftnorm.scripts.checkpoints import dtype_of
from draftnorm.scripts.collect_corpus import collect
from draftnorm.scripts.evaluate_pair import evaluate_pair
from draftnorm.scripts.options import add_device_arguments, count, positive_int
from draftnorm.scripts.terminal import stderr_console

# Beside tokenizer.model, so that transformers, too, takes text as it is.
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TOKENIZER_CONFIG = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "legacy": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(metavar="STEP", required=True)

    step = steps.add_parser("corpus", help="collect Python source of installed packages")
    _add_folders(step, out="corpus")
    packages = [Path(path) for path in site.getsitepackages()]
    step.add_argument("--root", type=_folder, nargs="+", default=packages, metavar="SITE_PACKAGES")
    step.set_defaults(run=run_corpus)

    step = steps.add_parser("tokenizer", help="train the tokenizer and write token ids")
    _add_folders(step, corpus="corpus")
    step.add_argument("--vocab-size", type=positive_int, default=8192, metavar="N")
    step.add_argument("--megabytes", type=float, default=40.0, help="size of the sample")
    step.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this one, train none")
    step.set_defaults(run=run_tokenizer)

    step = steps.add_parser("target", help="train the Mixtral-style target")
    _add_folders(step, corpus="corpus", out="target")
    step.add_argument("--preset", choices=PRESETS, default="target")
    _add_training_arguments(step)
    step.set_defaults(run=run_target)

    step = steps.add_parser("draft", help="distil the Llama-style draft from the target")
    _add_folders(step, corpus="corpus", target="target", out="draft")
    step.add_argument("--layers", type=positive_int, default=2, metavar="N")
    step.add_argument("--hidden-size", type=positive_int, default=128, metavar="N")
    step.add_argument(
        "--generate",
        type=count,
        default=73_728,
        metavar="N",
        help="let the target write N blocks first; 0 keeps those of the last run",
    )
    step.add_argument(
        "--mix", type=positive_int, default=7, metavar="N", help="blocks of it to one of real text"
    )
    step.add_argument("--first-choice", type=float, default=0.5, help="weight of the argmax's loss")
    _add_training_arguments(step)
    step.set_defaults(run=run_draft)

    step = steps.add_parser("evaluate", help="measure the pair on held-out text")
    _add_folders(step, corpus="corpus", target="target", draft="draft")
    step.add_argument(
        "--other", type=Path, metavar="DIR", help="a model to compare bits a byte with"
    )
    step.add_argument("--prompts", type=positive_int, default=200, metavar="N")
    step.add_argument("--out", type=Path, default=Path("runs/evaluation.json"), metavar="FILE")
    step.set_defaults(run=run_evaluate)


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return Path(text)


def _add_folders(parser: argparse.ArgumentParser, **folders: str) -> None:
    """Arguments that name folders, by default those under runs/."""
    for name, folder in folders.items():
        parser.add_argument(f"--{name}", type=Path, default=Path("runs", folder), metavar="DIR")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    parser.add_argument("--steps", type=positive_int, metavar="N")
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="blocks a step")
    parser.add_argument("--learning-rate", type=float, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def run_corpus(args: argparse.Namespace) -> int:
    manifest = collect(args.out, roots=args.root)
    print(json.dumps({key: manifest[key] for key in ("bytes", "files_left_out")}), file=sys.stderr)
    return 0


def run_tokenizer(args: argparse.Namespace) -> int:
    file = args.corpus / "tokenizer.model"
    if args.tokenizer is None:
        max_bytes = int(args.megabytes * 1e6)
        train_tokenizer(args.corpus, args.corpus, vocab_size=args.vocab_size, max_bytes=max_bytes)
    else:
        shutil.copy(args.tokenizer, file)
    for split in SPLITS:
        print(f"{split}: {tokenise(args.corpus, split, file):,} tokens", file=sys.stderr)
    return 0


def run_target(args: argparse.Namespace) -> int:
    shape, config = PRESETS[args.preset]
    blocks, held_out = (
        TokenBlocks.open(args.corpus / f"{split}.bin", config.block_size)
        for split in ("train", "validation")
    )
    model, history = _train(shape, config, blocks, next_token_loss(config), args)
    _save(model, history, args, validation=evaluate(model, held_out, max_blocks=256))
    return 0


def run_draft(args: argparse.Namespace) -> int:
    device, dtype = resolve_placement(args.device, dtype_of(args))
    target = load_model(args.target, device=device, dtype=dtype)
    shape = draft_config(target.config, num_layers=args.layers, hidden_size=args.hidden_size)
    config = replace(DRAFT, block_size=min(DRAFT.block_size, target.config.context))
    text = TokenBlocks.open(args.corpus / "train.bin", config.block_size)
    file = args.corpus / "generated.bin"
    if args.generate:
        _generate(target, text, file, args.generate)
    generated = TokenBlocks.open(file, config.block_size)
    blocks = MixedBlocks((*[generated] * args.mix, text))
    loss_of = distillation_loss(target, first_choice=args.first_choice)
    _save(*_train(shape, config, blocks, loss_of, args), args)
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    evaluation = evaluate_pair(args.corpus, args.target, args.draft, args.other, args.prompts)
    text = json.dumps(evaluation, indent=1)
    print(text)
    args.out.write_text(text + "\n")
    return 0


def _generate(target: Transformer, text: TokenBlocks, file: Path, blocks: int) -> None:
    """Let the target continue pieces of training text, to `file`: two sequences a block."""
    prompts = TokenBlocks(text.tokens, text.size // 4)
    sequences = 2 * blocks
    batches = continuations(target, prompts, batch_size=min(sequences, len(prompts), 8192))
    with file.open("wb") as output:
        while sequences > 0:
            tokens_BS = next(batches)[:sequences]
            output.write(tokens_BS.to(torch.uint16).cpu().numpy().tobytes())
            sequences -= len(tokens_BS)
        output.write(bytes(2))  # blocks are read with the token that follows them


def _train(
    shape: ModelConfig, config: TrainingConfig, blocks: TokenBlocks | MixedBlocks, loss_of: Loss,
    args: argparse.Namespace,
) -> tuple[Transformer, list[dict]]:  # fmt: skip
    """A new model trained as the arguments say; the progress bar has loss, speed and time left."""
    names = ("steps", "batch_size", "learning_rate", "seed")
    config = replace(config, **{n: v for n in names if (v := getattr(args, n)) is not None})
    device, dtype = resolve_placement(args.device, dtype_of(args))
    model = Transformer(shape, device=device, dtype=dtype).init_weights(args.seed)
    console = stderr_console()
    console.print(f"{args.out.name}: {shape.parameters:,} parameters on {device}, {dtype}")
    columns = (
        TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f} · {task.fields[rate]:,.0f} tokens/s ·"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=config.steps, loss=float("nan"), rate=0.0)

        def report(row: dict) -> None:
            progress.update(
                task, completed=row["step"], loss=row["loss"], rate=row["tokens_per_second"]
            )

        return model, train(model, config, blocks, loss_of, folder=args.out, report=report)


def _save(
    model: Transformer, history: list[dict], args: argparse.Namespace, **results: dict
) -> None:
    """Write the checkpoint with its tokenizer, the history and, with matplotlib, the curve."""
    save_model(model.to(torch.bfloat16), args.out, max_shard_size="14MB")
    shutil.copy(args.corpus / "tokenizer.model", args.out)
    for name, content in (
        ("tokenizer_config.json", TOKENIZER_CONFIG | SPECIAL),
        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2}),
        ("history.json", {"command": args.command_line, "history": history} | results),
    ):
        (args.out / name).write_text(json.dumps(content, indent=1) + "\n")
    numbers = {k: history[-1][k] for k in ("step", "loss", "tokens_per_second")} | results
    print(json.dumps(numbers), file=sys.stderr)
    plot(history, args.out / "loss.png")


def plot(history: list[dict], file: Path) -> None:
    """The loss over the steps. Without matplotlib (the extra `plot`) this says so and goes on."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {file}: `pip install draftnorm[plot]` brings matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*((row["step"], row["loss"]) for row in history), strict=True), linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss, nats a token", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
