"""What the READMEs show works as written."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parent.parent
READMES = {
    str(path.parent.relative_to(ROOT)): path.read_text()
    for path in sorted([ROOT / "README.md", *ROOT.glob("*/**/README.md")])
    if path.relative_to(ROOT).parts[0] in ("README.md", "jaxmf_opt", "benchmarks")
}


def blocks(readme: str, language: str) -> list[str]:
    fenced = re.findall(
        r"^```(\w*)\n(.*?)^```$", READMES[readme], re.DOTALL | re.MULTILINE
    )
    return [text for of_language, text in fenced if of_language == language]


def test_the_table_is_that_of_the_comparison():
    results = json.loads((ROOT / "benchmarks" / "comparison.json").read_text())
    assert report.table(results) in READMES["benchmarks"]


@pytest.mark.mixes  # as a user might, with the settings of a user
@pytest.mark.parametrize("readme", [r for r in READMES if blocks(r, "python")])
def test_every_python_block_runs(
    readme: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip("matplotlib")
    # It is replaced, as the top README shows. (Here it is put back.)
    from jax_privacy.matrix_factorization import optimization

    monkeypatch.setattr(optimization, "optimize", optimization.optimize)
    monkeypatch.chdir(tmp_path)  # for the files that it writes
    scope: dict[str, object] = {}
    for block in blocks(readme, "python"):  # each continues those before it
        exec(block, scope)
    printed = capsys.readouterr().out.splitlines()
    shown = re.findall(r"print\(.*\)  # (.*)", READMES[readme])
    assert set(shown) <= set(printed)


def test_the_first_page_is_short():
    assert len(READMES["."].encode()) <= 8_000


@pytest.mark.parametrize("readme", READMES)
def test_links_within_the_repository_lead_somewhere(readme: str):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", READMES[readme])
    for path, heading in links:
        target = (ROOT / readme / path).resolve()
        assert target.exists(), path
        if heading:
            text = target.read_text() if path else READMES[readme]
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            slugs = [
                re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles
            ]
            assert heading in slugs, heading


def test_ci_runs_the_commands_as_written():
    ci = (ROOT / ".ci" / "run").read_text()
    commands = [line for block in blocks(".", "sh") for line in block.splitlines()]
    assert len(commands) == 2
    for command in commands:
        assert f"\n{command}\n" in ci


def test_nothing_imports_what_stands_above_it():
    floors = re.findall(r"^  (\w+)", blocks("jaxmf_opt", "")[-1], re.MULTILINE)
    package = ROOT / "jaxmf_opt"
    for path in package.rglob("*.py"):
        folders = path.relative_to(package).with_suffix("").parts
        if folders[0] not in floors:  # __init__ and __main__
            continue
        imports = r"^ *from (\.+)([\w.]*) import (\w+)"
        for dots, module, name in re.findall(imports, path.read_text(), re.MULTILINE):
            base = folders[: len(folders) - len(dots)]
            target = (*base, *(module.split(".") if module else []), name)[0]
            assert floors.index(target) >= floors.index(folders[0]), (path, target)


@pytest.mark.skipif(not shutil.which("git"), reason="git says which files are ours")
def test_no_stray_files_at_the_top():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert top <= {
        *("pyproject.toml", "jaxmf_opt", "tests", "benchmarks", "README.md"),
        *("LICENSE", "CHANGELOG.md", ".gitignore", ".ci"),
    }
