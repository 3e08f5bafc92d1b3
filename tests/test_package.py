"""The package as users get it: import surface, metadata, pins, and a wheel that runs by itself."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import draftnorm

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("kernels", "model", "decoding", "scripts")


def run(*command: object, **settings: object) -> str:
    words = [str(word) for word in command]
    finished = subprocess.run(words, capture_output=True, text=True, **settings)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def test_public_names_load():
    for name in draftnorm.__all__:
        assert getattr(draftnorm, name) is not None
    with pytest.raises(AttributeError):
        draftnorm.no_such_name  # noqa: B018


def test_import_is_free_of_heavy_packages():
    heavy = {"torch", "triton", "transformers", "rich"}
    code = f"import draftnorm, sys; print(sorted({heavy!r} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=ROOT) == "[]\n"


def test_folders_do_not_shadow_other_packages():
    # PyPI has a package `kernels`, which transformers imports: a folder without __init__ yields.
    assert not [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()]


def test_imports_point_one_way():
    for level, folder in enumerate(FOLDERS):
        above = "|".join(FOLDERS[level + 1 :])
        for file in (ROOT / folder).rglob("*.py") if above else ():
            found = re.search(rf"(from|import) draftnorm\.({above})\b", file.read_text())
            assert found is None, f"{file}: {found and found.group()}"


def test_every_requirement_is_pinned():
    def name(requirement: str) -> str:
        return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {name(line) for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)}
    extras = PROJECT["project"]["optional-dependencies"]
    installed_by_make = [*PROJECT["project"]["dependencies"], *extras["fetch"], *extras["plot"]]
    assert {name(r) for r in [*installed_by_make, *extras["dev"]]} <= pins


def test_make_help_lists_the_targets():
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    text = run("make", "help", cwd=ROOT)
    assert all(f"make {target} " in text for target in ("demo", "test", "lint", "help"))


def test_readme_example_runs(make_checkpoint, capsys):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert set(re.findall(r"^(?:from|import) (\S+)", code, flags=re.MULTILINE)) == {"draftnorm"}
    target = str(make_checkpoint())
    exec(code.replace("checkpoints/smollm2-135m", target), {})  # it asserts identity itself
    assert capsys.readouterr().out


def test_readme_names_every_file_and_a_short_first_reading():
    text = (ROOT / "README.md").read_text()
    for folder in ("kernels", "model", "decoding"):
        for file in (ROOT / folder).glob("*.py"):
            assert f"  {file.name} " in text, f"{folder}/{file.name} is not in the README's tree"
    path = text[text.index("First reading") :].split("\n\n")[0]
    files = [ROOT / name for name in re.findall(r"`(\w+/\w+\.py)`", path)]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 1500


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy of the sources, so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("draftnorm", *FOLDERS):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    return next(out.glob("*.whl"))


def test_wheel_holds_what_runs_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in FOLDERS:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        for file in files:
            if "__pycache__" not in file.parts:
                assert f"draftnorm/{file.relative_to(ROOT)}" in names
    assert "draftnorm/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    # Nothing lands outside the package, where it could shadow somebody else's.
    assert {name.split("/")[0] for name in names} == {
        "draftnorm",
        f"draftnorm-{draftnorm.__version__}.dist-info",
    }


def test_wheel_speculates_in_an_empty_environment(wheel, make_checkpoint, tmp_path):
    """Install the wheel into a new environment and run the console script from elsewhere.

    The environment gets the wheel alone. torch and the rest, gigabytes that a test should not
    download again, it sees through a .pth file that names this environment's site-packages. Such a
    line comes after the new environment's own packages, and .pth files in the folder that it names
    are not read, so neither this checkout nor an editable install of it can stand in for the wheel.
    """
    target = make_checkpoint()
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-c", query).strip())
    parents = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    parents |= {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "parent.pth").write_text("\n".join(sorted(parents)))

    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    where = run(
        python,
        "-c",
        "import draftnorm.scripts.main as m; print(m.__file__)",
        cwd=tmp_path,
        env=environment,
    )
    assert Path(where.strip()) == site_packages / "draftnorm" / "scripts" / "main.py"

    command = tmp_path / "venv" / "bin" / "draftnorm"
    argv = ["speculate", "--target", target, "--draft", "ngram", "--prompt", "abab", "--json"]
    argv += ["--device", "cpu", "--max-new-tokens", "8", "--ignore-eos", "--compare"]
    document = json.loads(run(command, *argv, cwd=tmp_path, env=environment))
    assert len(document["token_ids"]) == 8
    assert document["identical"] is True
    assert document["draftnorm"] == draftnorm.__version__
    assert document["commit"] is None  # there is no checkout around an installed wheel
