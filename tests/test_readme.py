"""The README's commands, in its order, as a new user types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(text: str) -> list[str]:
    """Blocks of code, without comments, which are translated."""
    return [re.sub(r"\s+# .*", "", block) for block in re.findall(r"^```.*?^```", text, re.S | re.M)]


def typed(command: str, folder: Path, env: Mapping[str, str], said: str) -> subprocess.CompletedProcess[str]:
    """Result of a command that succeeds, after some lines on standard input."""
    result = subprocess.run(
        command, shell=True, cwd=folder, env=env, input=said, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def figures(line: str) -> list[str]:
    """Numbers, code and pages of a line, in order."""
    return re.findall(r"`[^`]+`|\]\([^)]+\)|\d[\d.,]*\d|\d", line)


def test_the_chinese_readme_says_the_same() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert blocks(english) == blocks(chinese) and len(blocks(english)) == 5
    tables = [[line for line in text.splitlines() if line.startswith("|")] for text in (english, chinese)]
    assert len(tables[0]) == len(tables[1]) > 40
    for ours, theirs in zip(*tables, strict=True):
        if "train.py sft`" in ours:  # whose order is another in Chinese
            assert sorted(figures(ours)) == sorted(figures(theirs))
        else:
            assert figures(ours) == figures(theirs) and ours.count("|") == theirs.count("|")
    links = [re.findall(r"\]\(([^)]+)\)", text)[1:] for text in (english, chinese)]  # but for those to each other
    assert links[0] == links[1]
    prose = [re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).replace("\n", " ") for text in (english, chinese)]
    code = [sorted(re.findall(r"`([^`]+)`", text)) for text in prose]
    assert code[0] == code[1]
    headings = [len(re.findall(r"^## ", text, re.M)) for text in (english, chinese)]
    assert headings[0] == headings[1]


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.slow
def test_every_command_of_the_readme_works(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- commands -->\n```sh\n(.*?)```", text, re.S)
    python = re.search(r"```python\n(.*?)```", text, re.S)
    assert block and python
    for name in ("train.py", "generate.py", "README.md"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    first = "python train.py --train.steps 3 --train.compile false"
    for line in [first, *block[1].splitlines()]:
        # the run that the README goes on from is the default one, here cut to a few steps
        command = line.replace("--train.minutes 1", "--train.steps 5")
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=os.environ | cache, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip()
    result = subprocess.run(
        [sys.executable, "-c", python[1]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.startswith("68976648192"), result.stderr
    decoding = (ROOT / "docs/decoding.md").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text + decoding, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "This"}\n{"prompt": "A module that"}\n', encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", decoding, re.S) for line in block.splitlines()]
    assert len(lines) >= 4
    for line in lines:
        command = re.sub("BIG|SMALL", "runs/tiny/model", line)
        if " generate " in command:
            command += " --max-new-tokens 5"
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=os.environ | cache, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        # a model of five steps may well write nothing but line ends
        assert len(result.stdout) > 1 or " generate " not in command, f"{command}\n{result.stderr}"


@pytest.mark.slow
def test_three_lines_lead_to_a_chat(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- chat -->\n```sh\n(.*?)```", text, re.S)
    assert block
    (tmp_path / "train.py").write_text((ROOT / "train.py").read_text(encoding="utf-8"), encoding="utf-8")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    short = " --train.steps 3 --train.compile false --validate.tokens 2000"
    for line in block[1].splitlines():
        command = line + (short if "train.py" in line else " --max-new-tokens 8")
        result = typed(command, tmp_path, os.environ | cache, "What does json.dumps do?\n")
        assert result.stdout.strip()
    assert "minillama chat" in text and "runs/sft/model" in text


@pytest.mark.slow
def test_every_command_of_the_tokenizers_page_works(tmp_path: Path) -> None:
    text = (ROOT / "docs/tokenizers.md").read_text(encoding="utf-8")
    block, grow, config = (
        re.search(rf"{head}[^\n]*\n.*?```{kind}\n(.*?)```", text, re.S)
        for head, kind in (
            ("## Train, look, compare", "sh"),
            ("## A vocabulary that learns", "sh"),
            ("Then a run", "toml"),
        )
    )
    assert block and grow and config
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    train = "minillama tokenizer train --kind {} --vocab-size 500 --input README.md --output {}"
    words = {"BASE": "base", "EXTRA": "extra", "TEXT": "README.md"}
    bpe = "sentencepiece --model-type bpe"
    lines = [*block[1].splitlines(), train.format(bpe, "base"), train.format("unigram", "spare")]
    lines.append(train.format("sentencepiece", "extra").replace("README.md", "python-docs"))
    for i, line in enumerate(grow[1].splitlines()):
        lines.append(" ".join(words.get(word, word) for word in line.split()).replace("grown", f"grown{i}"))
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in lines:
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    from minillama import Decoder, ModelConfig, Tokenizer

    shape = ModelConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, vocab_size=500, max_seq_len=64)
    Decoder(shape).save_pretrained(tmp_path / "runs/tiny/model")
    Tokenizer.load(tmp_path / "base").save(tmp_path / "runs/tiny/model")
    (tmp_path / "run.toml").write_text(config[1].replace('"grown"', '"grown0"'))
    command = "minillama train run.toml --data.sources README.md --train.steps 3 --train.batch_size 2 --out run"
    result = subprocess.run(
        command, shell=True, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "stage 1 of 3, to step 3: trains" in result.stdout, result.stderr


@pytest.mark.slow
def test_every_command_of_the_formats_page_works(tmp_path: Path) -> None:
    from minillama import Decoder, ModelConfig
    from minillama.tokenizer import byte_tokenizer

    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=257, max_seq_len=256)
    Decoder(config).save_pretrained(tmp_path / "runs/tiny/model")
    byte_tokenizer().save(tmp_path / "runs/tiny/model")
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    block = re.search(r"## Convert and inspect\n\n```sh\n(.*?)```", text, re.S)
    assert block
    (tmp_path / "generate.py").write_text((ROOT / "generate.py").read_text(encoding="utf-8"), encoding="utf-8")
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in block[1].splitlines():
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert (tmp_path / "tiny.gguf").is_file() and (tmp_path / "tiny-hf/model.safetensors").is_file()


@pytest.mark.slow
def test_every_command_of_the_pages_on_blanks_and_runs_works(tmp_path: Path) -> None:
    """As they stand, but for settings that keep the runs short."""
    pages = [(ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("family", "runs")]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page, re.S)]
    assert len(blocks) == 3
    for name in ("train.py", "generate.py"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    reviews = [
        f'{{"text": "The soup was {word}, number {i}.", "label": "{label}"}}'
        for i in range(20)
        for word, label in (("warm", "positive"), ("stale", "negative"))
    ]
    (tmp_path / "reviews.jsonl").write_text("\n".join(reviews), encoding="utf-8")
    short = (
        " --train.steps 2 --train.batch_size 2 --train.compile false --validate.tokens 500 --sample.max_new_tokens 0"
    )
    lines = [line for line in "\n".join(blocks).replace("\\\n", "").splitlines() if line]
    other = "python train.py --model.preset rwkv-tiny --out runs/{}"
    lines[-2:-2] = [other.format("tiny"), other.format("other")]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in lines:
        command = line + short if line.startswith("python train.py") else line
        command = command.replace(" --model.preset glm-tiny", " --model.preset glm-tiny --train.context 64")
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=os.environ | cache, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip() or "generate.py" in command  # two steps may teach it to write nothing


@pytest.mark.slow
def test_every_command_of_the_fine_tuning_page_works(tmp_path: Path) -> None:
    """On a tiny chat model, but for that which asks a teacher."""
    from minillama import Decoder, ModelConfig
    from minillama.tokenizer import byte_tokenizer
    from minillama.tokenizer.template import load_template, special_tokens

    tokenizer = byte_tokenizer().with_special(special_tokens("chatml"))
    tokenizer = tokenizer.with_chat_template(load_template("chatml", tokenizer).source)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64, "max_seq_len": 256}
    for name in ("MODEL", "runs/tiny/model"):
        Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **shape)).save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name)
    records = (json.dumps({"prompt": f"Which is {i}?", "response": f"It is {i}."}) for i in range(300))
    (tmp_path / "FILE.jsonl").write_text("\n".join(records), encoding="utf-8")
    (tmp_path / "train.py").write_text((ROOT / "train.py").read_text(encoding="utf-8"), encoding="utf-8")
    page = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.S)
    lines = [line for line in "\n".join(blocks).splitlines() if line and "--teacher" not in line]
    assert len(lines) == 10
    short = " --train.batch_size 2 --train.compile false --train.context 128 --sample.max_new_tokens 0"
    outs = iter(["first", "full", "a", "int4", "ziya"])
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in lines:
        command = line.partition(" #")[0].replace("FILE", "FILE.jsonl").replace("runs/sft", "runs/a")
        command = command.replace("b=runs/b", "b=runs/int4")
        if "train.py" in command:
            command += short + f" --out runs/{next(outs)}" + " --train.steps 2" * ("ziya" not in command)
        command += " --max-new-tokens 4" if re.search(r" (chat|generate) ", command) else ""
        result = typed(command, tmp_path, os.environ | cache, "Which is 3?\n")
        assert (result.stdout + result.stderr).strip()
