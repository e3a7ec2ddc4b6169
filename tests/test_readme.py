"""The pages a newcomer reads: their links resolve, their tables name tests that are there, their Python runs."""

import json
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.core import meta

from fm_jax.data.text import tokenizer as tokenizers
from fm_jax.hub import pretrained
from fm_jax.models.language import decoder

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in [*ROOT.rglob("*.md"), *ROOT.glob(".github/**/*.md")]
    if not any(part.startswith((".venv", ".pytest")) or part == "runs" for part in page.relative_to(ROOT).parts)
)
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")
HUB = ROOT / "fm_jax" / "hub" / "README.md"
FRONT = (ROOT / "README.md").read_text()


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table that begins with a heading."""
    table = text.split(heading)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def families() -> dict[str, list[tuple[str, str]]]:
    """Row -> its (word, file) cells."""
    table = rows(HUB.read_text(), "| family | loads |")
    return {row[0]: [pair for cell in row[1:] for pair in LINK.findall(cell)] for row in table}


def anchors(page: Path) -> set[str]:
    """Return the names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("family", families())
def test_every_cell_of_a_family_is_a_test_that_speaks_of_it(family: str) -> None:
    links = families()[family]
    assert len(links) >= 5
    for word, file in links:
        assert word in (HUB.parent / file).read_text(), f"{file} does not say {word}"


def test_the_front_pages_ticks_are_the_families_that_tests_show() -> None:
    table = rows(FRONT, "| family | load |")
    assert [row[0] for row in table if row[1] == "✓"] == [*families()]
    assert all(cell in ("✓", "–", "backbone") for row in table for cell in row[1:4])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for _, link in LINK.findall(page.read_text()):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / file if file else page
        assert target.exists(), f"{link} is not there"
        assert not anchor or anchor in anchors(target), f"{link}: no heading #{anchor}"


def test_every_experiment_picture_is_shown_once() -> None:
    shown = [link for _, link in LINK.findall((ROOT / "experiments" / "README.md").read_text()) if "pictures/" in link]
    assert sorted(shown) == sorted(f"pictures/{path.name}" for path in (ROOT / "experiments/pictures").iterdir())


def test_every_command_names_an_experiment_that_is_there() -> None:
    named = {name for page in PAGES for name in re.findall(r"\bexperiments((?:\.[a-z0-9_]+)+)", page.read_text())}
    names = {name.removesuffix(".py") for name in named} - {"."}
    missing = [name for name in names if not (ROOT / f"experiments{name.replace('.', '/')}.py").exists()]
    assert names and not missing


def test_the_index_of_experiments_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / ".ci" / "index.py"))
    text = (ROOT / "experiments" / "README.md").read_text()
    between = text.split(script["BEGIN"] + "\n")[1].split(script["END"])[0]
    assert between == script["index"](), "run: python .ci/index.py"
    modules = [path for path in (ROOT / "experiments").rglob("*.py") if not path.stem.startswith("_")]
    assert all(f"({path.relative_to(ROOT / 'experiments').as_posix()})" in between for path in modules)


def test_the_front_page_is_read_in_a_minute() -> None:
    assert FRONT.count("\n") <= 130
    for command in ("./launch.sh local experiments.quickstart ", "./launch.sh test "):
        assert f"\n{command}" in FRONT


def test_the_front_pages_python_finetunes_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizers.train(["all you need is attention, and attention is all you have"] * 3, 280)
    model = decoder.Decoder(decoder.gpt(1, 16, 2, tokenizer.vocab_size, 64))
    params = meta.unbox(model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"])
    monkeypatch.chdir(tmp_path)
    pretrained.save("models/gpt2", model, params, tokenizer)
    (block,) = re.findall(r"```python\n(.*?)```", FRONT, re.S)
    Path("front.py").write_text(block)
    runpy.run_path("front.py")
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert json.loads(Path("finetuned/config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    before, after = (pretrained.load(folder) for folder in ("models/gpt2", "finetuned"))
    assert after.module == before.module and after.tokenizer is not None
    assert all(
        (old != new).any()
        for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True)
        if old.ndim > 2
    )
