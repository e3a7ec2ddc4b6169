import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from fm_jax.core.config import apply_overrides, changes, diff, from_dict, split_argv, to_dict
from fm_jax.core.errors import ConfigError, DataError
from fm_jax.core.options import help_text, options


@dataclass(frozen=True)
class Model:
    num_heads: int = 4  # query heads
    d_model: int = 64
    act: Literal["gelu", "relu"] = "gelu"
    sizes: tuple[int, ...] = (1, 2)
    """Widths of the
    stages."""
    window: int | None = None

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide d_model {self.d_model}")


@dataclass(frozen=True)
class Opt:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    no_decay: tuple[str, ...] = (".*bias",)


@dataclass(frozen=True)
class Schedule:
    warmup_steps: int = 10
    kind: Literal["cosine", "linear"] = "cosine"


@dataclass(frozen=True)
class Lora:
    rank: int = 8
    alpha: float = 16.0


@dataclass(frozen=True)
class Start:
    path: Path
    strict: bool = True


@dataclass(frozen=True)
class Sgd:
    momentum: float = 0.9


@dataclass(frozen=True)
class Config:
    seed: int = 0
    name: str = "a"
    bf16: bool = False
    out: Path = Path("x")
    note: str | None = None
    level: Literal[1, 2, "auto"] = 1
    model: Model = field(default_factory=Model)
    opt: Opt = Opt()
    schedule: Schedule = Schedule()
    lora: Lora | None = None
    start: Start | None = None
    rule: Opt | Sgd = Sgd()


GOOD = [
    (["--seed", "1_000"], "seed", 1000),
    (["--seed=1e6"], "seed", 1_000_000),
    (["--seed", "-3"], "seed", -3),
    (["--seed", "123456789012345678"], "seed", 123456789012345678),
    (["--bf16", "true"], "bf16", True),
    (["--name="], "name", ""),
    (["--name=--x"], "name", "--x"),
    (["--name", "a=b"], "name", "a=b"),
    (["--note", "none"], "note", None),
    (["--note", "some"], "note", "some"),
    (["--out", "a/b c"], "out", Path("a/b c")),
    (["--level", "2"], "level", 2),
    (["--level", "auto"], "level", "auto"),
    (["--opt.lr", "3"], "opt.lr", 3.0),
    (["--opt.lr=3e-4"], "opt.lr", 3e-4),
    (["--opt.betas", "0.8, 0.9"], "opt.betas", (0.8, 0.9)),
    (["--opt.no_decay", "a,b"], "opt.no_decay", ("a", "b")),
    (["--opt.no_decay="], "opt.no_decay", ()),
    (["--model.sizes", "7"], "model.sizes", (7,)),
    (["--model.window", "5"], "model.window", 5),
    (["--lora.rank", "4"], "lora", Lora(rank=4)),
    (["--lora", "none"], "lora", None),
    (["--start.path", "w"], "start", Start(Path("w"))),
    (["--rule.momentum", "0"], "rule", Sgd(0.0)),
    (["--rule", "Sgd"], "rule", Sgd()),
    (["--rule", "Opt"], "rule", Opt()),
    (["--rule.lr", "3", "--rule", "Opt"], "rule", Opt(lr=3.0)),
]


@pytest.mark.parametrize(("argv", "path", "value"), GOOD)
def test_sets_one_option_and_nothing_else(argv: list[str], path: str, value: Any) -> None:
    before = Config()
    after = apply_overrides(before, argv)
    got: Any = after
    for part in path.split("."):
        got = getattr(got, part)
    assert got == value
    assert type(got) is type(value)
    assert all(changed == path or changed.startswith(path) for changed in changes(before, after))


BAD = [
    (["--opt.lrr", "1"], r"^unknown option --opt\.lrr; did you mean --opt\.lr\?$"),
    (["--warmup", "1"], r"did you mean --schedule\.warmup_steps\?"),
    (["--warmup-steps", "1"], r"did you mean --schedule\.warmup_steps\?"),
    (["--model.num-heads", "1"], r"did you mean --model\.num_heads\?"),
    (["--optim.lr", "1"], r"did you mean --opt\.lr\?"),
    (["--sede", "1"], r"did you mean --seed\?"),
    (["--se", "1"], r"unknown option --se; did you mean --seed\?"),
    (["--SEED", "1"], r"unknown option --SEED; did you mean --seed\?"),
    (["--zzzz", "1"], r"^unknown option --zzzz$"),
    (["--wokdir", "1"], r"did you mean --workdir\?"),
    (["--model", "big"], r"--model is a section; set one of its options: --model\.act"),
    (["--seed", "1.5"], r"--seed: '1.5' is not int"),
    (["--seed", "x"], r"--seed: 'x' is not int"),
    (["--seed", ""], r"is not int"),
    (["--seed", "nan"], r"is not int"),
    (["--seed", "1e999999999"], r"is not int"),
    (["--seed", "9" * 5000], r"is not int"),
    (["--seed", "true"], r"is not int"),
    (["--opt.lr", "nan"], r"--opt\.lr: 'nan' is not float"),
    (["--opt.lr", "-inf"], r"is not float"),
    (["--opt.lr", "1e999"], r"is not float"),
    (["--opt.lr", "__import__('os').getcwd()"], r"is not float"),
    (["--bf16", "yes"], r"--bf16: 'yes' is not true\|false"),
    (["--bf16", "1"], r"is not true\|false"),
    (["--bf16"], r"--bf16 needs a value"),
    (["--bf16", "--seed", "1"], r"--bf16 needs a value"),
    (["--model.act", "gelo"], r"--model\.act: 'gelo' is not gelu\|relu; did you mean gelu\?"),
    (["--level", "3"], r"is not 1\|2\|auto"),
    (["--opt.betas", "0.9"], r"--opt\.betas: '0\.9' is not float,float"),
    (["--opt.betas", "0.9,x"], r"is not float,float"),
    (["--model.sizes", "1,,2"], r"is not int,…; there is nothing between two commas"),
    (["--model.sizes", "1,2,"], r"is not int,…"),
    (["--out", "a\0b"], r"is not path"),
    (["--out", "a\nb"], r"is not path"),
    (["--out="], r"is not path"),
    (["--seed", "1", "--seed", "2"], r"--seed is given twice"),
    (["--seed=1", "--seed", "2"], r"--seed is given twice"),
    (["seed", "1"], r"unexpected argument 'seed'"),
    (["-seed", "1"], r"unexpected argument '-seed'"),
    (["--", "1"], r"unexpected argument '--'"),
    (["--seed", "1", "2"], r"unexpected argument '2'"),
    (["--model.num_heads", "3"], r"^model: num_heads 3 does not divide d_model 64$"),
    (["--lora", "none", "--lora.rank", "2"], r"cannot be combined with options inside"),
    (["--rule", "Opd"], r"^--rule: 'Opd' is not Opt\|Sgd; did you mean Opt\?$"),
    (["--rule.lr", "1"], r"^--rule\.lr is an option of --rule Opt; add that$"),
    (["--rule", "Opt", "--rule.momentum", "1"], r"--rule\.momentum is an option of --rule Sgd; add that"),
    (["--rule", "Opt", "--rule.lrr", "1"], r"unknown option --rule\.lrr; did you mean --rule\.lr\?"),
    (["--lora", "on"], r"--lora: 'on' is not section\|none"),
    (["--start.strict", "true"], r"--start\.path is required"),
    (["--out", "None"], r"--out: 'None' is not path$"),
    (["--out", "~"], r"--out: '~' is not path$"),
    (["--start.path", "null"], r"--start\.path: 'null' is not path$"),
    (["--opt.no_decay", "a,,b"], r"--opt\.no_decay: 'a,,b' is not text,…; there is nothing between two commas"),
    (["--opt.no_decay", "a,"], r"nothing between two commas, or after the last one$"),
    (["--opt.no_decay", ",a"], r"nothing between two commas"),
    (["--opt.no_decay", ","], r"nothing between two commas"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(a)[:40].replace("\0", "0") for a, _ in BAD])
def test_refuses_in_one_short_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        apply_overrides(Config(), argv, also=("workdir", "config"))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) <= 350


SECRETS = [
    "hf_" + "aB3dE5gH7j" * 3 + "kLmN",
    "sk-" + "a1B2c3D4" * 6,
    "sk-proj-" + "a1_B2-c3D4" * 8,
    "ghp_" + "a1B2c3D4e5F6" * 3,
    "github_pat_" + "a1B2c3D4e5_" * 7,
    "glpat-" + "a1B2c3D4e5" * 2,
    "xoxb-123456789012-1234567890123-" + "a1B2c3D4" * 3,
    "AKIA" + "ABCD1234" * 2,
    "AIza" + "a1B2c3D" * 5,
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:8])
@pytest.mark.parametrize("form", ["{}", "https://user:{}@host/x", "out/{}/run"])
def test_a_secret_is_refused_and_not_repeated(secret: str, form: str) -> None:
    with pytest.raises(ConfigError, match=r"^--name: the value looks like a secret") as caught:
        apply_overrides(Config(), ["--name", form.format(secret)])
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "out/hf_checkpoint",
        "hf_internal_testing/tiny_random_gpt2_of_many_words_and_more",
        "sk-learn-baseline-with-a-long-name-2024-and-more",
        "ghp_notes_of_the_project",
        "runs/AKIAB",
        "AKIAABCD1234ABCD12345",
        "xoxb-project-of-mine-and-yours",
        "a" * 40,
    ],
)
def test_an_ordinary_path_is_no_secret(path: str) -> None:
    assert apply_overrides(Config(), ["--name", path, "--out", path]).out == Path(path)


@pytest.mark.parametrize("text", ["none", "None", "NONE", "null", "Null", "~"])
def test_none_is_none_however_it_is_spelt(text: str) -> None:
    cfg = apply_overrides(Config(note="x", lora=Lora()), ["--note", text, "--lora", text, "--model.window", text])
    assert (cfg.note, cfg.lora, cfg.model.window) == (None, None, None)
    assert apply_overrides(Config(), ["--name", text]).name == text  # a text that cannot be left out


def test_a_path_may_begin_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert apply_overrides(Config(), ["--out=~/runs/a"]).out == Path("/home/ada/runs/a")
    assert apply_overrides(Config(), ["--out", "a~/~b"]).out == Path("a~/~b")


def test_a_section_is_validated_after_all_its_options_are_set() -> None:
    cfg = apply_overrides(Config(), ["--model.num_heads", "3", "--model.d_model", "9"])
    assert (cfg.model.num_heads, cfg.model.d_model) == (3, 9)


def test_any_error_of_ours_from_a_section_names_the_section() -> None:
    @dataclass(frozen=True)
    class Data:
        shards: int = 1

        def __post_init__(self) -> None:
            if self.shards < 1:
                raise DataError("no shards")

    top = dataclasses.make_dataclass("Top", [("data", Data, field(default_factory=Data))], frozen=True)
    with pytest.raises(ConfigError, match=r"^data: no shards$"):
        apply_overrides(top(), ["--data.shards", "0"])


def test_untouched_config_is_returned_as_it_is() -> None:
    cfg = Config()
    assert apply_overrides(cfg, []) is cfg
    assert apply_overrides(cfg, ["--seed", "1"]).model is cfg.model


FULL = Config(
    note="n",
    opt=Opt(lr=0.1 + 0.2, betas=(1 / 3, math.nextafter(1.0, 0.0)), no_decay=()),
    lora=Lora(alpha=1),
    start=Start(Path("a/b"), strict=False),
    rule=Opt(),
    level="auto",
)


@pytest.mark.parametrize("cfg", [Config(), FULL])
def test_json_round_trip_is_exact(cfg: Config) -> None:
    text = json.dumps(to_dict(cfg), allow_nan=False)
    again = from_dict(Config, json.loads(text))
    assert again == cfg
    assert type(again.rule) is type(cfg.rule)
    assert json.dumps(to_dict(again)) == text


def test_a_whole_number_in_a_float_field_is_written_as_a_float() -> None:
    assert json.dumps(to_dict(Opt(lr=1))) == json.dumps(to_dict(Opt(lr=1.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, r"unknown key sed; did you mean seed\?"),
        ({"opt": {"lr": 1.0, "lrr": 2}}, r"unknown key opt\.lrr; did you mean opt\.lr\?"),
        ({"seed": True}, r"seed: true is not int"),
        ({"seed": 1.0}, r"seed: 1\.0 is not int"),
        ({"bf16": 1}, r"bf16: 1 is not true\|false"),
        ({"opt": {"lr": float("nan")}}, r"opt\.lr: NaN is not float"),
        ({"opt": {"lr": "1e-4"}}, r"opt\.lr: \"1e-4\" is not float"),
        ({"opt": {"betas": [0.1]}}, r"opt\.betas: \[0\.1\] is not float,float"),
        ({"opt": 3}, r"opt: 3 is not section"),
        ({"level": "1"}, r"level: \"1\" is not 1\|2\|auto"),
        ({"start": {}}, r"key start\.path is missing"),
        ({"model": {"num_heads": 3}}, r"^model: num_heads 3 does not divide"),
        ({"rule": {"class": "os.system"}}, r"rule: .* is not Opt\|Sgd"),
        ({"_target_": "os.system"}, r"unknown key _target_"),
    ],
)
def test_from_dict_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, to_dict(Config()) | change)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), print, {1: 2}])
def test_to_dict_refuses_what_is_not_data(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"opt\.lr: .* is not config data"):
        to_dict(Config(opt=Opt(lr=value)))


def test_diff_lists_every_changed_key_and_no_other() -> None:
    new = Config(seed=2, opt=Opt(lr=0.5, betas=(0.9, 0.9)), lora=Lora())
    assert diff(Config(), new) == [
        "seed: 0 -> 2",
        "opt.lr: 0.001 -> 0.5",
        "opt.betas: 0.9,0.95 -> 0.9,0.9",
        "lora: none -> {'rank': 8, 'alpha': 16.0}",
    ]
    assert diff(to_dict(Config()), to_dict(Config())) == []
    assert diff({"a": 1}, {"b": True}) == ["a: 1 -> (not set)", "b: (not set) -> true"]
    assert diff({"a": 1}, {"a": True}) == ["a: 1 -> true"]


def test_help_lists_every_option_with_type_value_and_comment() -> None:
    page = help_text(Config(opt=Opt(lr=0.25)), "What it does.\n\n    More.")
    assert page.startswith("What it does.\n\nMore.")
    lines = {line.split()[0]: line for line in page.splitlines() if line.startswith("  --")}
    assert set(lines) == {f"--{option.path}" for option in options(Config())}
    assert lines["--model.num_heads"].split() == ["--model.num_heads", "int", "4", "query", "heads"]
    assert lines["--model.sizes"].endswith("Widths of the stages.")
    assert "0.25" in lines["--opt.lr"]
    assert "gelu|relu" in lines["--model.act"]
    assert "--lora.rank" in lines
    assert "(not set)" in lines["--start.path"]


def test_split_argv_takes_both_spellings() -> None:
    assert split_argv(["--a.b", "1", "--c=2=3"]) == {"a.b": "1", "c": "2=3"}


@dataclass(frozen=True)
class Origin:
    from_: Path | None = None  # where it comes from
    step: int = 0


@dataclass(frozen=True)
class Resumed:
    init: Origin = Origin()


def test_a_field_named_by_a_word_of_python_is_spelt_without_its_underscore() -> None:
    cfg = apply_overrides(Resumed(), ["--init.from", "runs/a"])
    assert cfg == Resumed(Origin(Path("runs/a")))
    assert to_dict(cfg) == {"init": {"from": "runs/a", "step": 0}}
    assert from_dict(Resumed, to_dict(cfg)) == cfg
    assert diff(Resumed(), cfg) == ["init.from: none -> runs/a"]
    assert re.search(r"--init\.from +path\|none +none +where it comes from", help_text(Resumed()))
    with pytest.raises(ConfigError, match=r"unknown option --init\.from_; did you mean --init\.from\?"):
        apply_overrides(Resumed(), ["--init.from_", "runs/a"])
    with pytest.raises(ConfigError, match=r"unknown key init\.form; did you mean init\.from\?"):
        from_dict(Resumed, {"init": {"form": "runs/a"}})


def place(module: str) -> type:
    made = dataclasses.make_dataclass("Place", [("x", int, 0)], frozen=True)
    made.__module__ = f"a.{module}"  # afterwards: from Python 3.12 on make_dataclass sets the caller's
    return made


Near, Far = place("near"), place("far")


@dataclass(frozen=True)
class Journey:
    to: Near | Far = Near()  # type: ignore[valid-type]


@pytest.mark.parametrize(("kind", "name"), [(Near, "near.Place"), (Far, "far.Place")])
def test_two_classes_of_one_name_are_told_apart_by_their_modules(kind: Any, name: str) -> None:
    cfg = Journey(kind(3))
    assert to_dict(cfg) == {"to": {"class": name, "x": 3}}
    assert from_dict(Journey, to_dict(cfg)) == cfg
    with pytest.raises(ConfigError):
        from_dict(Journey, {"to": {"class": "Place", "x": 3}})
