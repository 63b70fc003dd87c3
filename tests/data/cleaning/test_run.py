"""Runs: parts, workers, kills, removed documents, training on the result."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from minillama.commands.cli import main
from minillama.data.cleaning.c4 import C4
from minillama.data.cleaning.document import Draft, Figures, Removal, Step
from minillama.data.cleaning.duplicates import DuplicateParagraphs, ExactDuplicates, HostLines
from minillama.data.cleaning.gopher import GopherQuality, GopherRepetition
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.minhash import NearDuplicates
from minillama.data.cleaning.pipeline import Pipeline
from minillama.data.cleaning.run import Cleaning
from minillama.data.sources import Source, cleaning_of, documents, records
from minillama.errors import InputError

ALL = (
    GopherRepetition(),
    GopherQuality(),
    C4(end_punctuation=False),
    ExactDuplicates(),
    DuplicateParagraphs(),
    NearDuplicates(),
)


@pytest.fixture
def web(shared: Path, tmp_path: Path) -> Path:
    """60 documents of C4."""
    lines = (shared / "text" / "en" / "c4_demo.jsonl").read_text(encoding="utf-8").split("\n")[:60]
    (tmp_path / "web.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "web.jsonl"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_kept_and_removed_add_up(clean: Any, web: Path) -> None:
    kept, removed = clean([Input(str(web))], *ALL, part=2**14)
    assert len(kept) + len(removed) == 60 and len(kept) > 30
    assert len({line["id"] for line in kept + removed}) == 60
    words = next(line for line in removed if line["removed"]["reason"] == "words")
    assert words["removed"] == {
        "step": "gopher-quality",
        "reason": "words",
        "value": pytest.approx(25, abs=25),
        "limit": 50,
    }
    assert kept[0]["measured"]["gopher-quality"]["words"] >= 50 and kept[0]["where"].endswith("web.jsonl:1")


def pipeline_of(web: Path, shared: Path) -> Pipeline:
    return Pipeline("test", (Input(str(web)), Input(str(shared / "web/dedup"), "d", suffixes=(".jsonl",))), ALL)


def test_workers_leave_the_same_bytes(web: Path, shared: Path, tmp_path: Path) -> None:
    pipeline = pipeline_of(web, shared)
    for workers in (1, 2):
        Cleaning(pipeline, tmp_path / f"{workers}", 2**16).run(workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked to be killed")
def test_ten_kills_leave_the_same_bytes(web: Path, shared: Path, tmp_path: Path) -> None:
    pipeline, out, rng = pipeline_of(web, shared), tmp_path / "killed", random.Random(0)
    Cleaning(pipeline, tmp_path / "whole", 2**14).run()
    for killed in range(10):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                Cleaning(pipeline, out, 2**14).run()
            os._exit(0)
        limit, end = len(list((out / ".cleaning").glob("*/*.json"))) + rng.randrange(1, 5), time.monotonic() + 60
        while len(list((out / ".cleaning").glob("*/*.json"))) < limit and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(rng.random() / 100)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), f"finished after {killed} kills"
    Cleaning(pipeline, out, 2**14).run()
    assert contents(out) == contents(tmp_path / "whole")


def test_small_parts_change_nothing_but_the_files(clean: Any, web: Path) -> None:
    source = Input(str(web))
    small, large = (clean([source], *ALL, part=size, name=str(size))[0] for size in (2**15, 2**26))
    assert [line["text"] for line in small] == [line["text"] for line in large]


def test_training_reads_the_result(web: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["data", "clean", "english", str(web), "--output", str(out), "--workers", "1"]
    assert main(words) == 0
    assert "gopher-quality" in capsys.readouterr().out
    texts = [document.text for document in documents(Source(str(out)))]
    manifest = json.loads((out / "cleaned.json").read_text())
    assert len(texts) == manifest["documents"] > 30 and manifest["pipeline"] == "english"
    assert main(words) == 1 and "finished cleaning" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert [document.text for document in documents(Source(str(out)))] == texts
    named = {key: manifest[key] for key in ("pipeline", "fingerprint")}
    assert cleaning_of(Source(str(out))) == cleaning_of(Source(path=f"{out}/web-*.jsonl.zst")) == named
    assert cleaning_of(Source(path=str(web))) is None


def test_only_shards_come_from_a_cleaning(clean: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean(["a text"])
    monkeypatch.chdir(tmp_path / "out")
    for name in ("other.txt", "python-docs", "tinyshakespeare"):
        Path(name).write_text("text")
    Path("folder").mkdir()
    (shard,) = (str(path) for path in Path().glob("*.jsonl.zst"))
    made = cleaning_of(Source(path=shard))
    assert made and made["pipeline"] == "test" and cleaning_of(Source(".")) == cleaning_of(Source("*.zst")) == made
    for name in ("python-docs", "hf:foo", "arithmetic:3", "tinyshakespeare", "other.txt", "folder", "nowhere", "*"):
        assert cleaning_of(Source(name)) is None, name


@pytest.mark.slow
def test_provenance_names_the_pipeline(web: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["data", "clean", str(web), "--output", str(out), "--workers", "1"]) == 0
    train = [
        "train",
        "--data.sources",
        str(out),
        "--train.steps",
        "1",
        "--train.batch_size",
        "2",
        "--train.context",
        "8",
    ]
    assert main([*train, "--data.cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]) == 0
    provenance = json.loads((tmp_path / "run" / "provenance.jsonl").read_text())
    assert provenance["cleaned"][str(out)]["pipeline"] == "english"


def test_an_unfinished_folder_is_no_source(tmp_path: Path) -> None:
    (tmp_path / ".cleaning").mkdir()
    with pytest.raises(InputError, match="not finished"):
        list(documents(Source(str(tmp_path))))


def test_duplicates_are_removed_across_sources_by_preference(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one  two"}\n{"text": "three"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": "one two"}\n')
    for first, second in ("ab", "ba"):
        sources = tuple(Input(str(tmp_path / f"{name}.jsonl")) for name in (first, second))
        output = tmp_path / first
        made = Cleaning(Pipeline("p", sources, (ExactDuplicates(),)), output).run()
        assert [shard["documents"] for shard in made["shards"]] == [2, 1]
        assert made["shards"][0]["file"].startswith(f"{first}-")


def test_paragraphs_and_host_lines(clean: Any) -> None:
    kept, _ = clean(["Same line!\nfirst 12", "same line! \nfirst 34", "third\nSAME line!"], DuplicateParagraphs())
    assert [line["text"] for line in kept] == ["Same line!\nfirst 12", "third"]
    pages = [{"text": f"Menu\npage {i}", "url": f"http://{host}/{i}"} for i in range(3) for host in ("a.org", "b.org")]
    kept, _ = clean([*pages[:5], {"text": "Menu"}], HostLines(pages=3), name="hosts")
    assert [line["text"] for line in kept] == ["page 0", "Menu\npage 0", "page 1", "Menu\npage 1", "page 2", "Menu"]


class Fails(Step):
    def measure(self, draft: Draft) -> Figures:
        raise RecursionError("deep")


def test_a_document_on_which_a_step_stumbles_is_removed_alone() -> None:
    from minillama.data.cleaning.pipeline import Stage
    from minillama.data.cleaning.run import _through
    from minillama.data.cleaning.tally import Tally

    gone = _through(Draft("x", id="0-0"), Stage(None, (Fails("fails"),), None, 0), None, [], Tally())
    assert gone == ("fails", Removal("error", "RecursionError: deep"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[[steps]]\nname = "gopher"', "p.toml:2, steps.0.name"),
        ('[[steps]]\nname = "c4"\nmin_sentence = 3', "did you mean 'min_sentences'"),
        ('[[steps]]\nname = "c4"\nsources = ["x"]', "a step for a source that is not there"),
        ('[[steps]]\nname = "c4"\nlanguages = ["en"]\n[[steps]]\nname = "language"', "which no step before identifies"),
        ("", "no sources"),
    ],
)
def test_what_is_wrong_is_said(text: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.toml").write_text(text)
    assert main(["data", "clean", str(tmp_path / "p.toml"), "--output", str(tmp_path / "out")]) == 1
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("perplexity", "ngram-lm train"),
        ("classifier", "classifier train"),
        ("model-score", "folder of a model"),
        ("sensitive-words", "one per line"),
    ],
)
def test_files_of_steps_are_sought_before_the_first_document(name: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for settings, what in (("", f"{name} needs a file"), (f'path = "{tmp_path}/none"', f"file of {name} is not there")):
        steps = f'[[steps]]\nname = "exact-duplicates"\n[[steps]]\nname = "{name}"\n{settings}'
        (tmp_path / "p.toml").write_text(f'sources = [{{ path = "{tmp_path}/a.txt" }}]\n{steps}')
        with pytest.raises(InputError, match=what) as caught:
            Cleaning(Pipeline.load(str(tmp_path / "p.toml")), tmp_path / "out").run()
        assert fix in str(caught.value.fix)
        assert not (tmp_path / "out").exists()


def test_sources_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "clean", "englsh", "--output", str(tmp_path / "out")]) == 1
    assert "did you mean 'english'" in capsys.readouterr().err
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.c").write_text("int main() { return 0; }\n")
    (tmp_path / "code" / "b.json").write_text('[{"paragraphs": ["int b;"], "path": "b.c", "title": "no text"}]')
    code = Pipeline.load("code").with_sources((str(tmp_path / "code"), str(tmp_path / "code" / "b.json")))
    Cleaning(code, tmp_path / "out").run()
    assert [document.text for document in documents(Source(str(tmp_path / "out")))] == [
        "int main() { return 0; }\n",
        "int b;",
    ]


def test_a_field_of_the_pipeline_is_named_where_a_record_lacks_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"body": 3}\n')
    own = Pipeline("p", (Input(str(path), field="body"),))
    other = own.with_sources((str(path),))
    for pipeline, where in ((own, "this source"), (other, r"the pipeline's first source \(sources.0.field\)")):
        with pytest.raises(InputError, match=rf"no text field(?s:.)*correct field = 'body' of {where}"):
            Cleaning(pipeline, tmp_path / where[:8]).run()
    path.write_text(path.read_text() + '{"body": "b"}\n')
    Cleaning(other, tmp_path / "out").run(2)
    lines = records(Source(str(tmp_path / "out" / "removed" / "unread.jsonl.zst")))
    assert [line.value["removed"]["value"].partition("; ") for line in lines] == [
        (other.sources[0].setting, "; ", found) for found in ("fields 'text'", "3")
    ]


def test_another_pipeline_does_not_continue(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    source = (Input(str(tmp_path / "a.txt")),)
    Cleaning(Pipeline("p", source, (C4(),)), tmp_path / "out").start()
    Cleaning(Pipeline("p", source, (C4(),)), tmp_path / "out").start()
    with pytest.raises(InputError, match="other steps"):
        Cleaning(Pipeline("p", source, (C4(min_sentences=1),)), tmp_path / "out").start()
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    with pytest.raises(InputError, match="other sources"):
        Cleaning(Pipeline("p", source, (C4(),)), tmp_path / "out").start()


@pytest.mark.parametrize("name", ["english", "chinese", "ccnet", "code"])
def test_pipelines_that_come_with_it_load(name: str) -> None:
    pipeline = Pipeline.load(name)
    assert pipeline.name == name and len(pipeline.steps) >= 4 and len(pipeline.fingerprint) == 64
