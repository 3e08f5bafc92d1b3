"""Collect Python source of installed, permissively licensed packages: `draftnorm train corpus`.

Writes the text half of a corpus folder (model/corpus.py). The manifest records package, version,
licence, split, files and bytes, and what was left out and why: packages without a permissive
licence, vendored and generated files, data, exact and near copies, and files that the tokenizer
could not give back exactly.
"""

import json
import platform
import re
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import Distribution, distributions
from pathlib import Path

from draftnorm.model.corpus import SPLITS

HELD_OUT = {
    **dict.fromkeys(("click", "imageio", "networkx", "seaborn", "werkzeug"), "validation"),
    **dict.fromkeys(("attrs", "httpcore", "lineax", "markdown", "rich", "tabulate"), "prompts"),
}

_PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|ISC|ISCL|PSF|Python Software|Zlib|Unlicense|HPND)\b", re.I
)
_RESTRICTED = re.compile(
    r"GPL|General Public|Mozilla|MPL|Proprietary|EULA|Commercial|LicenseRef", re.I
)
_VENDORED = re.compile(r"(^|/)_?(vendor|vendored|extern|externals?|third_?party)(/|$)", re.I)
_GENERATED = re.compile(
    r"generated (by|from|file|code)|(auto|automatically)[- ]?generated|do not edit", re.I
)
_SKETCH = 64  # line hashes kept of a file


def licence_of(package: Distribution) -> str | None:
    """The licence a package declares, if it is a permissive one; None if not, or if unknown.

    The SPDX expression wins, then the classifiers, then the first line of the free text (which may
    go on with the licences of bundled binaries).
    """
    metadata = package.metadata
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    text = (metadata.get("License") or "").strip().partition("\n")[0]
    declared = metadata.get("License-Expression") or "; ".join(
        c.rpartition(" :: ")[2] for c in classifiers
    )
    declared = declared or text
    if _PERMISSIVE.search(declared) and not _RESTRICTED.search(declared):
        return declared
    return None


def _sketch(text: str) -> list[int]:
    """The smallest hashes of a file's distinct lines; files that share most of them are alike.

    Bottom-k min-hashing (Broder 1997). Comments and short lines are left out, so that a licence
    header makes no two files alike.
    """
    lines = {line.strip() for line in text.splitlines()}
    hashes = {zlib.crc32(line.encode()) for line in lines if len(line) > 12 and line[0] != "#"}
    return sorted(hashes)[:_SKETCH]


def _reject(path: str, text: str) -> str | None:
    """Why a file is no source to learn from, or None."""
    if _VENDORED.search(path):
        return "vendored"
    if "\u2581" in text or "\0" in text:
        return "U+2581 or NUL"  # the tokenizer's own space mark; no id stands for NUL
    if _GENERATED.search(text[:1500]):
        return "generated"
    lines = text.splitlines()
    digits = sum(character.isdigit() for character in text)
    if (
        len(text) < 200
        or len(text) > 400_000
        or max(map(len, lines)) > 1000
        or digits > len(text) / 5
    ):
        return "data, or too short or long"
    return None


def _read_package(root: str, paths: Sequence[str]) -> tuple[list[tuple], Counter]:
    """One package's usable files, (path, text, sketch), and why how many others are not."""
    files, rejected = [], Counter()
    for path in paths:
        try:
            text = (Path(root) / path).read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            rejected["unreadable or not UTF-8"] += 1
            continue
        if reason := _reject(path, text):
            rejected[reason] += 1
        else:
            files.append((path, text, _sketch(text)))
    return files, rejected


def _is_near_copy(sketch: list[int], sketches: list[set[int]], index: dict[int, list[int]]) -> bool:
    """True if three quarters of the sketch lie in one seen before; else the sketch is remembered.

    Files alike share their smallest hashes, so only files with one of the eight smallest compare.
    """
    candidates = Counter(file for key in sketch[:8] for file in index[key])
    for file, _ in candidates.most_common(16):
        if sum(key in sketches[file] for key in sketch) > 0.75 * len(sketch):
            return True
    for key in sketch[:8]:
        index[key].append(len(sketches))
    sketches.append(set(sketch))
    return False


def find_packages(roots: Sequence[Path]) -> tuple[list[dict], list[str]]:
    """Permissively licensed packages under the roots, the standard library; names of the others."""
    packages, refused = {}, []
    for package in distributions(path=[str(root) for root in roots]):
        name, licence = package.metadata["Name"].lower().replace("_", "-"), licence_of(package)
        paths = [str(f) for f in package.files or () if f.suffix == ".py" and ".." not in f.parts]
        if licence is None:
            refused.append(name)
        elif paths:
            root, version = str(package.locate_file("")), package.version
            packages[name] = dict(
                name=name, version=version, licence=licence, root=root, paths=paths
            )
    library = Path(sysconfig.get_path("stdlib"))
    paths = [str(path.relative_to(library)) for path in sorted(library.rglob("*.py"))]
    paths = [path for path in paths if "-packages/" not in path and "lib2to3/tests" not in path]
    version = platform.python_version()
    packages["python"] = dict(
        name="python", version=version, licence="PSF-2.0", root=str(library), paths=paths
    )
    return [packages[name] for name in sorted(packages)], sorted(refused)


def collect(out: Path, *, roots: Sequence[Path]) -> dict:
    """Write the split files and the manifest; return the manifest.

    Held-out packages come first, so that a training file which copies one of theirs is the one
    that is dropped.
    """
    packages, refused = find_packages(roots)
    packages.sort(key=lambda package: package["name"] not in HELD_OUT)
    out.mkdir(parents=True, exist_ok=True)
    outputs = {split: (out / f"{split}.jsonl").open("w") for split in SPLITS}
    exact, sketches, index = set(), [], defaultdict(list)
    left_out, entries = Counter(), []
    with ProcessPoolExecutor() as pool:
        jobs = [pool.submit(_read_package, p["root"], p["paths"]) for p in packages]
        for package, job in zip(packages, jobs, strict=True):
            files, rejected = job.result()
            left_out += rejected
            split, kept, size = HELD_OUT.get(package["name"], "train"), 0, 0
            for path, text, sketch in files:
                key = zlib.crc32(text.encode()), len(text)
                if key in exact or _is_near_copy(sketch, sketches, index):
                    left_out["exact copy" if key in exact else "near copy"] += 1
                    continue
                exact.add(key)
                record = {"package": package["name"], "path": path, "text": text}
                outputs[split].write(json.dumps(record) + "\n")
                kept, size = kept + 1, size + len(text.encode())
            if kept:
                entry = {key: package[key] for key in ("name", "version", "licence")}
                entries.append(entry | {"split": split, "files": kept, "bytes": size})
    for output in outputs.values():
        output.close()
    sizes = {s: sum(entry["bytes"] for entry in entries if entry["split"] == s) for s in SPLITS}
    manifest = {"bytes": sizes, "packages": entries, "files_left_out": dict(left_out)}
    manifest["packages_without_permissive_licence"] = refused
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest
