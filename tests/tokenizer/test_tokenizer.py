"""Loading, saving, encoding and decoding; transformers as the judge of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.tokenizer import END_OF_TEXT, Tokenizer, byte_tokenizer, char_tokenizer, train_byte_bpe

TEXT = "The café of 2024: naïve 东坡 drinks tea 🍵🍵, isn't it?\n\n  I'LL  pay $12345.67\tnow\r\n" * 3
BPE, BYTES, CHARS = train_byte_bpe([TEXT], 400), byte_tokenizer(), char_tokenizer([TEXT])
ALL = pytest.mark.parametrize("tokenizer", [BPE, BYTES, CHARS], ids=["bpe", "bytes", "chars"])


def strings(shared: Path) -> list[str]:
    """llama.cpp's 46 test strings."""
    text = (shared / "tokenizer/llama3/ggml-vocab-llama-bpe.gguf.inp").read_bytes().decode()
    return text.split("\n__ggml_vocab_test__\n")[:-1]


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
@given(text=st.text())
@settings(deadline=None)
def test_byte_level_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(alphabet=sorted(set(TEXT))))
@settings(deadline=None)
def test_chars_are_lossless_on_their_alphabet(text: str) -> None:
    ids = CHARS.encode(text)
    assert len(ids) == len(text)
    assert CHARS.decode(ids) == text


def test_each_unknown_character_is_one_unk() -> None:
    unk = CHARS.encode("<unk>", special=True)
    assert unk == [1]
    assert CHARS.encode("a龘龘t") == [*CHARS.encode("a"), 1, 1, *CHARS.encode("t")]
    assert CHARS.decode(CHARS.encode("a龘t"), skip_special=False) == "a<unk>t"


@ALL
def test_special_tokens_come_only_when_asked_for(tokenizer: Tokenizer) -> None:
    text = f"tea{END_OF_TEXT}it"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
    assert tokenizer.special_ids.isdisjoint(set(plain) - {1})  # chars: "<" and ">" are unknown
    assert special == [*tokenizer.encode("tea"), tokenizer.eos_id, *tokenizer.encode("it")]
    assert tokenizer.encode(text) == plain, "asking once must not change the next call"
    assert tokenizer.encode_batch([text, "tea"]) == [plain, tokenizer.encode("tea")]
    assert tokenizer.decode(special) == "teait"
    assert tokenizer.decode(special, skip_special=False) == text


@ALL
def test_bos_is_added_only_when_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("tea", bos=True) == [tokenizer.bos_id, *tokenizer.encode("tea")]
    assert tokenizer.encode("") == []


@ALL
@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("model_type", [None, "llama", "bloom", "minillama"])
def test_transformers_reads_the_folder(
    tokenizer: Tokenizer, add_bos: bool, model_type: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(tokenizer, "add_bos", add_bos)
    tokenizer.save(tmp_path, max_length=77)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.model_max_length == 77
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id if add_bos else None, tokenizer.eos_id)
    assert len(theirs) == tokenizer.vocab_size
    for text in ["", "tea , isn't it ?", TEXT, "  \n x1234", "未知 unknown 字"]:
        ids = tokenizer.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs(text).input_ids == tokenizer.encode(text, bos=add_bos)
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special=False)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@ALL
def test_save_then_load_is_the_identity(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    from_file = Tokenizer.load(str(tmp_path / "a" / "tokenizer.json"))
    again.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert tokenizer.fingerprint == again.fingerprint == from_file.fingerprint
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.eos_id, again.bos_id, again.add_bos) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.add_bos)


def test_fingerprints_differ() -> None:
    assert len({BPE.fingerprint, BYTES.fingerprint, CHARS.fingerprint, train_byte_bpe([TEXT], 300).fingerprint}) == 4


def test_add_bos_and_the_chat_template_survive(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"add_bos_token": False, "auto_map": {"x": "evil.py"}}
    file.write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path / "b")
    again = Tokenizer.load(tmp_path / "b")
    assert again.add_bos is False
    assert again.chat_template == tokenizer.chat_template == "{{ messages }}"
    assert "auto_map" not in (tmp_path / "b" / "tokenizer_config.json").read_text(encoding="utf-8")


def test_a_cut_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    spec = json.loads(BYTES.backend.to_str())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert len(Tokenizer.load(tmp_path).encode("a" * 99)) == 99


def test_llama2_file(shared: Path) -> None:
    tokenizer = Tokenizer.load(shared / "tokenizer" / "llama2" / "tokenizer.json")
    assert tokenizer.decode([1, 0, 2]) == ""
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (32003, 1, 2, True)
    lines = (shared / "tokenizer/llama2/ggml-vocab-llama-spm.gguf.out").read_text(encoding="utf-8").splitlines()
    expected = [[int(number) for number in line.split()] for line in lines]
    texts = strings(shared)
    assert len(texts) == len(expected) == 46
    wrong = [i for i, text in enumerate(texts) if text and tokenizer.encode(text) != expected[i]]
    assert not wrong
    assert tokenizer.encode("<s>") != [1] and tokenizer.encode("</s>")[-1] != 2
    assert tokenizer.pre is None


def test_pre_tokenizer_names() -> None:
    assert (BPE.pre, BYTES.pre, CHARS.pre) == ("smollm", "smollm", None)
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    cut = [pre_tokenizers.Split(Regex(llama3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    for pre, name in (
        (words, "gpt-2"),
        (pre_tokenizers.Sequence(cut), "llama-bpe"),
        (pre_tokenizers.Sequence([words, digits]), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    ):
        backend = Backend.from_str(BPE.backend.to_str())
        backend.pre_tokenizer = pre
        assert Tokenizer(backend).pre == name
    backend.pre_tokenizer, backend.normalizer = words, normalizers.NFC()
    assert Tokenizer(backend).pre is None


@pytest.mark.parametrize("text", ["{}", "[]", "", '{"model": {"type": "BPE"}}', "version https://git-lfs", "<html>"])
def test_fault_24_a_foreign_file_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(text, encoding="utf-8")
    for path in (file, tmp_path):
        with pytest.raises(InputError) as caught:
            Tokenizer.load(path)
        assert caught.value.where == file


@given(share=st.floats(0, 0.999))
@settings(deadline=None)
def test_fault_24_a_truncated_file_is_named(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("cut") / "tokenizer.json"
    whole = BPE.backend.to_str().encode()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError) as caught:
        Tokenizer.load(file)
    assert caught.value.where == file


def test_other_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)
    BYTES.save(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text('{"eos_token": "<eos>"}', encoding="utf-8")
    with pytest.raises(InputError, match="not in the vocabulary") as caught:
        Tokenizer.load(tmp_path)
    assert (caught.value.where, caught.value.found) == (settings_file, "<eos>")
    settings_file.write_text('{"eos_token": ', encoding="utf-8")
    with pytest.raises(InputError, match="not JSON") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.where == settings_file
    settings_file.unlink()
    bare = BYTES.backend.to_str().replace(END_OF_TEXT, "<stop>")
    (tmp_path / "tokenizer.json").write_text(bare, encoding="utf-8")
    with pytest.raises(InputError, match="names no end-of-text token"):
        Tokenizer.load(tmp_path)


def test_a_lone_surrogate_is_an_input_error() -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        BPE.encode_batch(["fine", "bad \udcff"])
    with pytest.raises(InputError, match="expected: a string"):
        BPE.encode(3)  # type: ignore[arg-type]
