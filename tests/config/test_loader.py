"""The strict loader: what it takes, and what it says about the rest."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from minillama.config import loader
from minillama.config.command_line import overrides
from minillama.config.loader import Origin, build, check, config_names, config_path, nearest, read_toml, to_dict
from minillama.errors import InputError
from minillama.runs.config import RunConfig, load_run_config
from minillama.runs.objectives import words_with_new_names


@dataclass(frozen=True)
class Source:
    path: str
    weight: float = field(default=1.0, metadata={"above": 0})


@dataclass(frozen=True)
class Inner:
    lr: float = field(default=1e-3, metadata={"above": 0, "below": 1})
    steps: int = field(default=10, metadata={"min": 1, "max": 100})
    mode: Literal["auto", "true", "false"] = "auto"


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    extra: Inner | None = None
    limit: int | None = None
    words: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()
    sources: tuple[Source, ...] = ()


TEXT = """\
name = "run"

[inner]
lr = 0.5  # a comment
"steps" = 3

[[sources]]
path = "a"

[[sources]]
path = "b"
weight = 2

[sources.options]
depth = 1
"""


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("name", "f.toml:1, name"),
        ("inner.lr", "f.toml:4, inner.lr"),
        ("inner.steps", "f.toml:5, inner.steps"),
        ("inner.mode", "f.toml:3, inner.mode"),
        ("sources.0.path", "f.toml:8, sources.0.path"),
        ("sources.0.weight", "f.toml:7, sources.0.weight"),
        ("sources.1.weight", "f.toml:12, sources.1.weight"),
        ("sources.1.options.depth", "f.toml:15, sources.1.options.depth"),
        ("absent.key", "f.toml, absent.key"),
    ],
)
def test_origin_finds_the_line(key: str, place: str) -> None:
    assert Origin(Path("f.toml"), TEXT).at(key) == place


def test_a_table_becomes_a_dataclass() -> None:
    made = build(Outer, tomllib.loads(TEXT.partition("[sources.options]")[0]))
    assert made == Outer("run", inner=Inner(0.5, 3), sources=(Source("a"), Source("b", 2.0)))
    assert type(made.sources[1].weight) is float


def test_values_of_a_base_hold_where_the_table_has_none() -> None:
    base = Outer(name="base", inner=Inner(lr=0.25, steps=7), words=("a",))
    made = build(Outer, {"inner": {"steps": 9}, "extra": {"steps": 2}}, base=base)
    assert made == Outer(name="base", inner=Inner(lr=0.25, steps=9), extra=Inner(steps=2), words=("a",))


@pytest.mark.parametrize(
    ("values", "where", "found", "expected"),
    [
        ({"name": 3}, "name", "3", "a string"),
        ({"flag": 1}, "flag", "1", "true or false"),
        ({"flag": "true"}, "flag", "'true'", "true or false"),
        ({"inner": {"lr": "0.1"}}, "inner.lr", "'0.1'", "a number"),
        ({"inner": {"lr": True}}, "inner.lr", "True", "a number"),
        ({"inner": {"steps": True}}, "inner.steps", "True", "a whole number"),
        ({"inner": {"steps": 3.0}}, "inner.steps", "3.0", "a whole number"),
        ({"inner": {"mode": "atuo"}}, "inner.mode", "'atuo'", "'auto' or 'true' or 'false'"),
        ({"inner": 3}, "inner", "3", "a table"),
        ({"limit": 1.5}, "limit", "1.5", "a whole number"),
        ({"words": "a"}, "words", "'a'", "a list of a string"),
        ({"words": ["a", 1]}, "words.1", "1", "a string"),
        ({"sources": [{"path": "a"}, "b"]}, "sources.1", "'b'", "a table"),
    ],
)
def test_nothing_is_converted_silently(values: dict[str, Any], where: str, found: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        build(Outer, values)
    assert (error.value.where, error.value.found, error.value.expected) == (where, found, expected)


def test_a_bare_boolean_is_accepted_where_a_third_value_is_a_word() -> None:
    assert build(Inner, {"mode": True}).mode == "true"
    assert build(Inner, {"mode": False}).mode == "false"


def test_a_missing_value_is_named() -> None:
    with pytest.raises(InputError, match="path is missing") as error:
        build(Outer, {"sources": [{"weight": 1}]}, Origin(Path("f.toml"), "[[sources]]\nweight = 1\n"))
    assert error.value.where == "f.toml:1, sources.0.path"


def test_an_unknown_key_names_its_line_and_the_nearest_key() -> None:
    text = "[inner]\n\nstep = 3\n"
    with pytest.raises(InputError, match="unknown key 'step'") as error:
        build(Outer, tomllib.loads(text), Origin(Path("f.toml"), text))
    assert (error.value.where, error.value.fix) == ("f.toml:3, inner.step", "did you mean 'steps'?")


def test_an_unknown_key_like_no_other_lists_them_all() -> None:
    with pytest.raises(InputError) as error:
        build(Outer, {"inner": {"qqqq": 1}})
    assert (error.value.expected, error.value.fix) == ("one of lr, steps, mode", None)


@pytest.mark.parametrize(
    ("instance", "where", "expected"),
    [
        (Inner(lr=0.0), "lr", "more than 0 and less than 1"),
        (Inner(lr=1.0), "lr", "more than 0 and less than 1"),
        (Inner(lr=math.nan), "lr", "a finite number, more than 0 and less than 1"),
        (Inner(steps=0), "steps", "at least 1 and at most 100"),
        (Inner(steps=101), "steps", "at least 1 and at most 100"),
        (Outer(extra=Inner(steps=0)), "extra.steps", "at least 1 and at most 100"),
        (Inner(steps=10**400), "steps", "at least 1 and at most 100"),
        (Outer(sources=(Source("a"), Source("b", math.inf))), "sources.1.weight", "a finite number, more than 0"),
        (Outer(numbers=(1.0, math.nan)), "numbers.1", "a finite number"),
    ],
)
def test_ranges_hold_at_every_depth(instance: Any, where: str, expected: str) -> None:
    with pytest.raises(InputError, match="out of range") as error:
        check(instance)
    assert (error.value.where, error.value.expected) == (where, expected)


def test_inclusive_bounds_are_inside() -> None:
    check(Outer(inner=Inner(steps=1), extra=Inner(steps=100), limit=2**63 - 1))


@pytest.mark.parametrize("limit", [2**63, 10**22, 10**400])
def test_a_whole_number_that_no_tensor_holds_is_out_of_range(limit: int) -> None:
    with pytest.raises(InputError, match="limit is out of range") as error:
        check(Outer(limit=limit))
    assert error.value.expected == f"at most {2**63 - 1}"


@dataclass(frozen=True)
class Strict:
    n: int = 0

    def __post_init__(self) -> None:
        if self.n % 2:
            raise InputError("n is odd", where="n")


@dataclass(frozen=True)
class Holder:
    strict: Strict = field(default_factory=Strict)


@pytest.mark.parametrize(
    ("origin", "where"), [(None, "strict.n"), (Origin(Path("f.toml"), "[strict]\nn = 3\n"), "f.toml:2, strict.n")]
)
def test_a_dataclass_that_refuses_itself_is_placed(origin: Origin | None, where: str) -> None:
    with pytest.raises(InputError, match="n is odd") as error:
        build(Holder, {"strict": {"n": 3}}, origin)
    assert error.value.where == where


small = st.floats(1e-6, 0.999)
inners = st.builds(Inner, small, st.integers(1, 100), st.sampled_from(["auto", "true", "false"]))
outers = st.builds(
    Outer,
    name=st.text(st.characters(exclude_categories=["Cs"])),
    flag=st.booleans(),
    inner=inners,
    extra=st.none() | inners,
    limit=st.none() | st.integers(-(2**62), 2**62),
    words=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=3).map(tuple),
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
    sources=st.lists(st.builds(Source, st.sampled_from("abc"), small), max_size=3).map(tuple),
)


@given(outers)
def test_what_is_written_is_read_back(config: Outer) -> None:
    assert build(Outer, tomllib.loads(tomli_w.dumps(to_dict(config)))) == config


def test_none_is_left_out() -> None:
    assert to_dict(Outer(words=("a",), sources=(Source("p"),))) == {
        "name": "x",
        "flag": False,
        "inner": {"lr": 1e-3, "steps": 10, "mode": "auto"},
        "words": ["a"],
        "numbers": [],
        "sources": [{"path": "p", "weight": 1.0}],
    }


def test_read_toml(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(TEXT)
    values, origin = read_toml(path)
    assert values == tomllib.loads(TEXT)
    assert origin.at("inner.lr") == f"{path}:4, inner.lr"


@pytest.mark.parametrize(
    ("text", "place"),
    [("a = 1\nb = \n", "2:5"), ("a = 1\na = 2\n", "2:6"), ('a = "x', "1:7"), ("[t]\nx = [1,\n", "3:1")],
)
def test_a_syntax_error_has_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "f.toml"
    path.write_text(text)
    with pytest.raises(InputError, match="not valid TOML") as error:
        read_toml(path)
    assert error.value.where == f"{path}:{place}"


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\n")
    assert read_toml(path)[0] == {"a": 1}


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    with pytest.raises(InputError, match="No such file") as error:
        read_toml(path)
    assert error.value.where == path
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(InputError, match="not UTF-8") as error:
        read_toml(path)
    assert error.value.where == path
    with pytest.raises(InputError, match="not a regular file"):
        read_toml(tmp_path)


@pytest.mark.parametrize("text", ["a = " + "[" * 3000, "a = " + "{b=" * 3000, "a = " + "9" * 5000])
def test_toml_that_the_library_gives_up_on_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="not valid TOML"):
        read_toml(tmp_path / "f.toml")


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(InputError, match="no such file"):
        config_path("train", "x" * 10_000 + ".toml")


def test_nearest_ignores_case_and_punctuation() -> None:
    names = ["llama-2-70b", "llama-2-7b", "stories15m"]
    assert nearest("llama2-70b", names) == "llama-2-70b"
    assert nearest("LLaMA_2_7B", names) == "llama-2-7b"
    assert nearest("qwerty", names) is None


def test_config_path_takes_names_and_paths(tmp_path: Path) -> None:
    assert "llama-2-70b" in config_names("model")
    assert config_path("model", "llama-2-70b").read_text().startswith("#")
    path = tmp_path / "mine.toml"
    path.touch()
    assert config_path("model", str(path)) == path
    for name, close in (("llama2-70b", "llama-2-70b"), ("LLAMA-7B", "llama-7b")):
        with pytest.raises(InputError) as error:
            config_path("model", name)
        assert error.value.fix == f"did you mean '{close}'?"
    with pytest.raises(InputError, match="no such file"):
        config_path("model", str(tmp_path / "absent.toml"))


def test_a_wheel_carries_the_configurations_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "minillama"
    (package / "configs" / "model").mkdir(parents=True)
    (package / "configs" / "model" / "only.toml").touch()
    monkeypatch.setattr(loader, "__file__", str(package / "config/loader.py"))
    assert config_names("model") == ["only"]


def test_an_old_name_goes_on_working_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Inner:
        new: int = field(default=1, metadata={"was": "old"})

    file = tmp_path / "a.toml"
    file.write_text("[inner]\nold = 3\n")
    values, origin = read_toml(file)
    assert build(Inner, values["inner"], origin, prefix="inner") == Inner(3)
    assert (
        capsys.readouterr().err
        == f"{file}:2, inner.old is now called new; the old name is removed in the next release\n"
    )
    question = ("--cloze.verbalisers", "good=fine", "bad=poor", "--objective.pattern", "{text} [MASK]")
    changed = overrides(words_with_new_names(list(question)), RunConfig)["objective"]
    assert changed["verbalizers"] == ["good=fine", "bad=poor"]
    assert "--objective.verbalisers is now called --objective.verbalizers" in capsys.readouterr().err


OLD = """
[train]
objective = "{name}"
z_loss = 1e-4
steps = 7
[blanks]
tokens = 0.9
share = 0.2
[cloze]
pattern = "{pattern}"
verbalisers = [{words}]
"""


@pytest.mark.parametrize(
    ("preset", "name", "expected"),
    [
        ("llama-tiny", "auto", {"name": "lm", "z_loss": 1e-4}),
        ("glm-tiny", "glm", {"name": "glm", "z_loss": 1e-4, "tokens": 0.9, "share": 0.2, "document": 0.2}),
        ("glm-tiny", "cloze", {"name": "cloze", "pattern": "{a} [MASK]", "verbalizers": ("x=y", "z=w")}),
    ],
)
def test_a_run_of_the_last_release_has_its_objective(
    preset: str, name: str, expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_cloze = name == "cloze"
    text = OLD.format(name=name, pattern="{a} [MASK]" if is_cloze else "", words="'x=y', 'z=w'" if is_cloze else "")
    file = tmp_path / "old.toml"
    file.write_text(f'[model]\npreset = "{preset}"\n{text}')
    config = load_run_config(str(file))
    assert config.train.steps == 7
    assert {key: getattr(config.objective, key) for key in expected} == expected
    assert "train.objective is now called [objective]" in capsys.readouterr().err
    again = load_run_config("tiny", ["--train.objective", "lm", "--train.z_loss=0.5"])
    assert again.objective.name == "lm" and again.objective.z_loss == 0.5  # type: ignore[union-attr]
    assert "--train.z_loss is now called --objective.z_loss" in capsys.readouterr().err


def test_the_name_chooses_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[model]\npreset = "glm-tiny"\n[objective]\nname = "glm"\ntokens = 0.7\n')
    config = load_run_config(str(file), ["--objective.z_loss", "0.1"])
    assert (config.objective.name, config.objective.z_loss) == ("glm", 0.1)  # type: ignore[union-attr]
    assert config.objective.tokens == 0.7  # type: ignore[union-attr]
    asked = ["--objective.name", "cloze", "--objective.pattern", "{a} [MASK]", "--objective.verbalizers", "x=y", "z=w"]
    assert load_run_config(str(file), asked).objective.name == "cloze"  # nothing of the file's glm is left
    both = tmp_path / "both.toml"
    both.write_text('[model]\npreset = "glm-tiny"\n[train]\nz_loss = 0.0\n[objective]\nname = "cloze"\n')
    assert load_run_config(str(both), asked).objective.name == "cloze"
    for wrong in ('objective = "lm"\n[train]\nz_loss = 0.1', "[objective]\nname = ['lm']"):
        both.write_text(wrong)
        with pytest.raises(InputError, match=r"objective|z_loss"):
            load_run_config(str(both))
    for words, said in (
        (["--objective.name", "gml"], "did you mean 'glm'"),
        (["--objective.beta", "1"], "--objective.beta"),
        (["--objective.name", "lm"], "made for another objective"),
        (["--objective.pattern", "{a} [MASK]"], "unknown key 'pattern'"),
    ):
        with pytest.raises(InputError, match=said):
            load_run_config(str(file), words)
