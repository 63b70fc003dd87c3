"""Adapters against PEFT: files in both directions, logits, gradients, merging."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minillama.config import ModelConfig
from minillama.config.lora import LoRAConfig
from minillama.errors import InputError
from minillama.formats import peft as files
from minillama.formats import peft_config
from minillama.formats.open import open_model
from minillama.layers.lora import Adapter
from minillama.model import Decoder
from minillama.model.lora import adapters, add_lora, load_adapter, lora_parameters, merge, save_adapter

peft = pytest.importorskip("peft", reason="the peft package")

# widths, heads and groups that differ from one another, so that a permutation or a swapped count shows
CONFIG = ModelConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=97, max_seq_len=64)
ENDS = ("embed_tokens", "lm_head")
CASES: dict[str, LoRAConfig] = {
    "lora": LoRAConfig(rank=3, alpha=5),
    "queries and values": LoRAConfig(rank=4, alpha=8, targets=("q_proj", "layers.1.self_attn.v_proj")),
    "rslora": LoRAConfig(rank=5, alpha=7, use_rslora=True),
    "dora": LoRAConfig(rank=3, alpha=6, use_dora=True),
    "ends": LoRAConfig(rank=3, alpha=6, targets=("all-linear", *ENDS)),
    "dora of the ends": LoRAConfig(rank=3, alpha=6, targets=("o_proj", *ENDS), use_dora=True),
    "whole ends": LoRAConfig(rank=3, alpha=6, modules_to_save=ENDS),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, as transformers writes it."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf()))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.15)
    folder = tmp_path_factory.mktemp("base")
    theirs.save_pretrained(folder)
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (2, 11), generator=torch.Generator().manual_seed(5))


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters that change the logits a lot."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def ours(base: Path, config: LoRAConfig) -> Decoder:
    model = add_lora(Decoder.from_pretrained(base), config, generator=torch.Generator().manual_seed(1))
    randomized(model)
    return model


def theirs(base: Path, config: LoRAConfig, **changes: Any) -> Any:
    torch.manual_seed(1)
    targets = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    if "all-linear" in targets and targets != "all-linear":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *ENDS]
    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": targets,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "modules_to_save": list(config.modules_to_save) or None,
        "task_type": "CAUSAL_LM",
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return randomized(peft.get_peft_model(model, peft.LoraConfig(**settings | changes)))


def quiet(folder: Path, base: Path) -> Any:
    """PEFT's model of a folder; a warning of keys that are missing or unknown is an error."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("case", CASES)
def test_our_adapter_has_the_same_logits_in_peft(case: str, base: Path, tmp_path: Path) -> None:
    model = ours(base, CASES[case])
    save_adapter(model, tmp_path / "a", base=open_model(base))
    with torch.no_grad():
        found, plain = quiet(tmp_path / "a", base)(tokens()).logits, Decoder.from_pretrained(base)(tokens())
        expected = model(tokens())
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert values["target_modules"] == sorted(values["target_modules"])
    assert values["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("case", CASES)
def test_their_adapter_has_the_same_logits_and_gradients_here(case: str, base: Path, tmp_path: Path) -> None:
    other = theirs(base, CASES[case])
    other.save_pretrained(tmp_path / "a")
    model = load_adapter(Decoder.from_pretrained(base), tmp_path / "a", trains=True)
    a, b = model(tokens()), other(tokens()).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for logits in (a, b):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in other.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in lora_parameters(model).items()}
    assert sorted(map(torch.numel, found.values())) == sorted(map(torch.numel, expected.values()))  # type: ignore[arg-type]
    for name, gradient in found.items():
        assert gradient is not None and gradient.any()
        torch.testing.assert_close(gradient, expected[_theirs(name)], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


def _theirs(name: str) -> str:
    """PEFT's name of a parameter."""
    layer, _, part = name.partition(".adapters.default.")
    if part == "weight":
        return f"base_model.model.{layer}.modules_to_save.default.weight"
    if part == "magnitude":
        return f"base_model.model.{layer}.lora_magnitude_vector.default.weight"
    if layer.endswith("embed_tokens"):
        return f"base_model.model.{layer}.{part.replace('lora_', 'lora_embedding_')}.default"
    return f"base_model.model.{layer}.{part}.default.weight"


@pytest.mark.parametrize("case", CASES)
def test_merged_is_what_was_trained(case: str, base: Path, tmp_path: Path) -> None:
    other = theirs(base, CASES[case]).eval()
    other.save_pretrained(tmp_path / "a")
    opened = open_model(base)
    with torch.no_grad():
        expected = other(tokens()).logits
        from_file = Decoder.from_pretrained(files.merged(opened, files.read(tmp_path / "a", opened.config)))
        in_memory = merge(load_adapter(Decoder.from_pretrained(base), tmp_path / "a"))
        torch.testing.assert_close(from_file(tokens()), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(in_memory.fuse()(tokens()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["lora", "queries and values", "rslora", "dora"])
def test_layers_that_transformers_fuses(case: str, tmp_path: Path) -> None:
    """Phi-3: adapters of the parts are one of the fused layer there, same logits, and come back as they were."""
    torch.manual_seed(0)
    config, folder, lora = replace(CONFIG, model_type="phi3"), tmp_path / "base", CASES[case]
    transformers.Phi3ForCausalLM(transformers.Phi3Config(**config.to_hf())).save_pretrained(folder)
    model = ours(folder, lora)
    save_adapter(model, tmp_path / "a", base=open_model(folder))
    again = load_adapter(Decoder.from_pretrained(folder), tmp_path / "a", base=open_model(folder))
    assert {n: p.rank for n, p in adapters(again).items()} == {n: p.rank for n, p in adapters(model).items()}
    with torch.no_grad():
        expected = model(tokens())
        torch.testing.assert_close(again(tokens()), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(quiet(tmp_path / "a", folder)(tokens()).logits, expected, atol=1e-5, rtol=1e-5)
    other = theirs(folder, replace(lora, targets=("all-linear",))).eval()
    other.save_pretrained(tmp_path / "b")
    with torch.no_grad():
        found = load_adapter(Decoder.from_pretrained(folder), tmp_path / "b")(tokens())
        torch.testing.assert_close(found, other(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_dora_of_a_part_of_a_fused_layer_is_refused(tmp_path: Path) -> None:
    model = add_lora(Decoder(replace(CONFIG, model_type="phi3")), LoRAConfig(targets=("q_proj",), use_dora=True))
    with pytest.raises(InputError, match="DoRA of a part"):
        files.write(tmp_path, model.config, adapters(model))


def test_ranks_and_alphas_by_pattern(base: Path, tmp_path: Path) -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {"layers.0.*k_proj": 7, "o_proj": 2},
        "alpha_pattern": {"model.layers.1.mlp.up_proj": 40, r"^model\.layers\.0\.mlp\..*": 1},
        "target_modules": r".*layers\.\d\.(self_attn\.[ko]_proj|mlp\.(up|down)_proj)",
    }
    other = theirs(base, LoRAConfig(rank=3, alpha=6), **patterns)
    other.save_pretrained(tmp_path / "a")
    model = load_adapter(Decoder.from_pretrained(base), tmp_path / "a")
    with torch.no_grad():
        expected = other.eval()(tokens()).logits
        torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=1e-5)
        save_adapter(model, tmp_path / "b", base=open_model(base))
        torch.testing.assert_close(quiet(tmp_path / "b", base)(tokens()).logits, expected, atol=1e-5, rtol=1e-5)
    sizes = {name: part.rank for name, part in adapters(model).items() if isinstance(part, Adapter)}
    assert sizes["model.layers.0.self_attn.k_proj"] == 7 and sizes["model.layers.1.self_attn.o_proj"] == 2
    assert len(sizes) == 8


def test_layers_that_are_left_out(base: Path, tmp_path: Path) -> None:
    other = theirs(base, LoRAConfig(), exclude_modules=["k_proj", "layers.1.mlp.up_proj"])
    other.save_pretrained(tmp_path / "a")
    model = load_adapter(Decoder.from_pretrained(base), tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), other.eval()(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_a_vocabulary_that_grew(base: Path, tmp_path: Path) -> None:
    """Chinese-LLaMA: more rows, embedding and head trained whole beside the low-rank updates."""
    model = Decoder.from_pretrained(base)
    model.resize_embeddings(111)
    randomized(add_lora(model, LoRAConfig(rank=3, targets=("q_proj",), modules_to_save=ENDS)))
    opened = open_model(base)
    save_adapter(model, tmp_path / "a", base=opened)
    ids = torch.cat((tokens(), tokens() + 14), dim=1)
    other = transformers.LlamaForCausalLM.from_pretrained(base)
    other.resize_token_embeddings(111)
    merged = files.merged(opened, files.read(tmp_path / "a", opened.config))
    with torch.no_grad():
        expected = model(ids)
        loaded = load_adapter(Decoder.from_pretrained(base), tmp_path / "a")
        assert loaded.config.vocab_size == merged.config.vocab_size == 111
        for found in (loaded, Decoder.from_pretrained(merged)):
            torch.testing.assert_close(found(ids), expected, atol=1e-5, rtol=1e-5)
        found = peft.PeftModel.from_pretrained(other, tmp_path / "a").eval()(ids).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    save_adapter(ours(base, LoRAConfig(rank=3, use_dora=True)), tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("target_parameters", ["mlp.weight"]),
        ("layer_replication", [[0, 1]]),
        ("layers_to_transform", [0]),
        ("trainable_token_indices", [1]),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [1]),
        ("eva_config", {"rho": 2.0}),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_2_SEQ_LM"),
        ("modules_to_save", ["norm"]),
        ("something_new", 1),
        ("r", 2.5),
        ("r", True),
        ("lora_alpha", "8"),
        ("rank_pattern", {"q_proj": 0}),
        ("target_modules", None),
        ("target_modules", "(a*)*b["),
        ("target_modules", [1]),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(folder: Path, base: Path, key: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError) as error:
        load_adapter(Decoder.from_pretrained(base), folder)
    assert key in str(error.value) and str(path) in str(error.value)


def test_a_regular_expression_that_takes_forever_is_refused(
    folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_config, "SECONDS", 0.05)  # seconds unless it is stopped
    path = folder / "adapter_config.json"
    slow = r"(?:\w|\w\w|\w\w\w|\w\w\w\w|\W|\W\w|\w\W)*[A-Z]"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": slow}))
    with pytest.raises(InputError, match="regular expression"):
        load_adapter(Decoder.from_pretrained(base), folder)


@pytest.mark.parametrize("change", ["missing", "unknown", "compiled", "shape"])
def test_tensors_that_do_not_match_are_refused_by_name(folder: Path, base: Path, change: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    taken = tensors.pop(key)
    if change == "unknown":
        tensors |= {key: taken, key.replace("q_proj", "r_proj"): taken.clone()}
    elif change == "compiled":
        tensors[key.replace("model.layers", "_orig_mod.model.layers")] = taken
    elif change == "shape":
        tensors[key] = taken[:, :2].contiguous()
    save_file(tensors, path, {"format": "pt"})
    model = Decoder.from_pretrained(base)
    with pytest.raises(InputError) as error:
        load_adapter(model, folder)
    assert "layers.1.self_attn" in str(error.value) and not any("adapters" in name for name in model.state_dict())


def test_another_base_is_refused(folder: Path, base: Path, tmp_path: Path) -> None:
    other = Decoder.from_pretrained(base)
    with torch.no_grad():
        other.blocks[0].mlp.up_proj.weight[0, 0] += 1e-3  # type: ignore[union-attr, index, operator]
    with pytest.raises(InputError, match="another base model"):
        load_adapter(other, folder)
    other.save_pretrained(tmp_path / "other")
    opened = open_model(tmp_path / "other")
    with pytest.raises(InputError, match="another base model"):
        files.merged(opened, files.read(folder, CONFIG))
    load_adapter(Decoder.from_pretrained(base, torch.bfloat16), folder, base=open_model(base))
    wide = Decoder(replace(CONFIG, dim=54))
    with pytest.raises(InputError, match="shape"):
        load_adapter(wide, folder)


def test_a_copied_base_weight_that_differs_is_refused(base: Path, tmp_path: Path) -> None:
    theirs(base, CASES["ends"]).save_pretrained(tmp_path / "a")
    model = Decoder.from_pretrained(base)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    with pytest.raises(InputError, match="another weight") as error:
        load_adapter(model, tmp_path / "a")
    assert "model.embed_tokens.weight" in str(error.value)


@pytest.mark.parametrize("kind", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("key", ["targets", "modules_to_save"])
def test_a_tied_embedding_or_head_is_refused(kind: str, key: str, tmp_path: Path) -> None:
    tied = Decoder(replace(CONFIG, tie_embeddings=True))
    with pytest.raises(InputError, match="one weight") as error:
        add_lora(tied, LoRAConfig(**{key: (kind,)}))  # type: ignore[arg-type]
    assert kind in str(error.value)
    save_adapter(add_lora(Decoder(CONFIG), replace(LoRAConfig(), **{key: (kind,)})), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one weight"):
        load_adapter(tied, tmp_path)
