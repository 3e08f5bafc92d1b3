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

# Modules that import torch are imported where they are used: --help and usage errors stay fast.
from draftnorm.scripts.options import add_device_arguments, count, positive_int, torch_dtype
from draftnorm.scripts.terminal import stderr_console

# Beside tokenizer.model, so that transformers, too, takes text as it is.
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TOKENIZER_CONFIG = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "legacy": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(metavar="STEP", required=True)

    step = steps.add_parser("corpus", help="collect Python source of installed packages")
    step.add_argument("--out", type=Path, default=Path("runs/corpus"), metavar="DIR")
    packages = [Path(path) for path in site.getsitepackages()]
    step.add_argument("--root", type=Path, nargs="+", default=packages, metavar="SITE_PACKAGES")
    step.set_defaults(run=run_corpus)

    step = steps.add_parser("tokenizer", help="train the tokenizer and write token ids")
    step.add_argument("--corpus", type=Path, default=Path("runs/corpus"), metavar="DIR")
    step.add_argument("--vocab-size", type=positive_int, default=8192, metavar="N")
    step.add_argument("--megabytes", type=float, default=40.0, help="size of the sample")
    step.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this one, train none")
    step.set_defaults(run=run_tokenizer)

    step = steps.add_parser("target", help="train the Mixtral-style target")
    step.add_argument("--preset", choices=("tiny", "target"), default="target")
    _add_training_arguments(step, "runs/target")
    step.set_defaults(run=run_target)

    step = steps.add_parser("draft", help="distil the Llama-style draft from the target")
    step.add_argument("--target", type=Path, default=Path("runs/target"), metavar="DIR")
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
    _add_training_arguments(step, "runs/draft")
    step.set_defaults(run=run_draft)

    step = steps.add_parser("evaluate", help="measure the pair on held-out text")
    step.add_argument("--corpus", type=Path, default=Path("runs/corpus"), metavar="DIR")
    step.add_argument("--target", type=Path, default=Path("runs/target"), metavar="DIR")
    step.add_argument("--draft", type=Path, default=Path("runs/draft"), metavar="DIR")
    step.add_argument(
        "--other", type=Path, metavar="DIR", help="a model to compare bits a byte with"
    )
    step.add_argument("--prompts", type=positive_int, default=200, metavar="N")
    step.add_argument("--out", type=Path, default=Path("runs/evaluation.json"), metavar="FILE")
    step.set_defaults(run=run_evaluate)


def _add_training_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--corpus", type=Path, default=Path("runs/corpus"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR")
    add_device_arguments(parser)
    parser.add_argument("--steps", type=positive_int, metavar="N")
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="blocks a step")
    parser.add_argument("--learning-rate", type=float, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def run_corpus(args: argparse.Namespace) -> int:
    from draftnorm.scripts.collect_corpus import collect

    manifest = collect(args.out, roots=args.root)
    print(json.dumps({key: manifest[key] for key in ("bytes", "files_left_out")}), file=sys.stderr)
    return 0


def run_tokenizer(args: argparse.Namespace) -> int:
    from draftnorm.model.corpus import SPLITS, tokenise, train_tokenizer

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
    from draftnorm.model.corpus import TokenBlocks
    from draftnorm.model.training import PRESETS, evaluate, next_token_loss

    shape, config = PRESETS[args.preset]
    config = _override(config, args)
    model = _new_model(shape, args)
    blocks = TokenBlocks.open(args.corpus / "train.bin", config.block_size)
    history = _train(model, config, blocks, next_token_loss(config), args)
    held_out = TokenBlocks.open(args.corpus / "validation.bin", config.block_size)
    _finish(model, history, args, validation=evaluate(model, held_out, max_blocks=256))
    return 0


def run_draft(args: argparse.Namespace) -> int:
    from draftnorm.decoding.distillation import DRAFT, MixedBlocks, distillation_loss, draft_config
    from draftnorm.model.checkpoint import load_model
    from draftnorm.model.corpus import TokenBlocks

    device, dtype = _placement(args)
    target = load_model(args.target, device=device, dtype=dtype)
    config = _override(DRAFT, args)
    config = replace(config, block_size=min(config.block_size, target.config.context))
    generated = args.corpus / "generated.bin"
    text = TokenBlocks.open(args.corpus / "train.bin", config.block_size)
    if args.generate:
        _generate(target, text, generated, args.generate)
    generated = TokenBlocks.open(generated, config.block_size)
    blocks = MixedBlocks((*[generated] * args.mix, text))
    shape = draft_config(target.config, num_layers=args.layers, hidden_size=args.hidden_size)
    draft = _new_model(shape, args)
    loss_of = distillation_loss(target, first_choice=args.first_choice)
    _finish(draft, _train(draft, config, blocks, loss_of, args), args)
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    from draftnorm.scripts.evaluate_pair import evaluate_pair

    evaluation = evaluate_pair(args.corpus, args.target, args.draft, args.other, args.prompts)
    args.out.write_text(json.dumps(evaluation, indent=1) + "\n")
    print(json.dumps(evaluation, indent=1))
    return 0


def _generate(target, text, file: Path, blocks: int) -> None:
    """Let the target continue pieces of training text, to `file`: two sequences a block."""
    import torch

    from draftnorm.decoding.distillation import continuations
    from draftnorm.model.corpus import TokenBlocks

    prompts = TokenBlocks(text.tokens, text.size // 4)
    sequences = 2 * blocks
    batches = continuations(target, prompts, batch_size=min(sequences, len(prompts), 8192))
    with file.open("wb") as output:
        while sequences > 0:
            tokens_BS = next(batches)[:sequences]
            output.write(tokens_BS.to(torch.uint16).cpu().numpy().tobytes())
            sequences -= len(tokens_BS)
        output.write(bytes(2))  # blocks are read with the token that follows them


def _override(config, args: argparse.Namespace):  # TrainingConfig -> TrainingConfig
    names = ("steps", "batch_size", "learning_rate", "seed")
    return replace(config, **{n: getattr(args, n) for n in names if getattr(args, n) is not None})


def _placement(args: argparse.Namespace):  # -> (torch.device, torch.dtype)
    from draftnorm.model.checkpoint import resolve_placement

    return resolve_placement(args.device, torch_dtype(args.dtype))


def _new_model(shape, args: argparse.Namespace):  # ModelConfig -> Transformer
    from draftnorm.model.transformer import Transformer

    device, dtype = _placement(args)
    return Transformer(shape, device=device, dtype=dtype).init_weights(args.seed)


def _train(model, config, blocks, loss_of, args: argparse.Namespace) -> list[dict]:
    """Train behind a progress bar with loss, tokens a second and time left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from draftnorm.model.training import train

    parameters = sum(parameter.numel() for parameter in model.parameters())
    console = stderr_console()
    console.print(f"{args.out.name}: {parameters:,} parameters on {model.device}, {model.dtype}")
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

        return train(model, config, blocks, loss_of, folder=args.out, report=report)


def _finish(model, history: list[dict], args: argparse.Namespace, **results: dict) -> None:
    """Write the checkpoint with its tokenizer, the history and, with matplotlib, the curve."""
    import torch

    from draftnorm.model.checkpoint import save_model

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
