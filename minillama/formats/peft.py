"""PEFT's adapter folders, adapter_config.json and adapter_model.safetensors: LoRA, rsLoRA, DoRA.

huggingface/peft 0.21.2, utils/save_and_load.py. Rows of query and key projections are half-split, as transformers and
`ModelFile.tensors` have them, so that nothing is permuted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.config.lora import EMBEDDING, HEAD, SCORE, matrices, named, refuse_tied
from minillama.errors import InputError
from minillama.files import refuse_remote, replace_file, replace_text
from minillama.formats import generation_config, hf, peft_fused
from minillama.formats.data_file import DataFile
from minillama.formats.layout import layout
from minillama.formats.model_file import LazyTensors, ModelFile
from minillama.formats.peft_config import CONFIG, VERSION, PeftConfig, read_config
from minillama.formats.safetensors_file import save_file
from minillama.formats.safetensors_header import read_header, read_metadata, refuse_integers
from minillama.layers.lora import Adapter, FullWeight

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT, COLUMNS = "base_sha256", "fused_columns"  # our keys in the metadata of the weights
Part = Adapter | FullWeight


@dataclass(frozen=True)
class AdapterFile:
    """Adapter folder, read.

    Attributes:
        path: the folder.
        config: the shape with the adapter; its vocabulary may be larger than the base's.
        adapters: by our names of the layers.
        base: the model that it was trained on, as its configuration calls it.
        fingerprint: of that model, see `fingerprint`; None where another program wrote the folder.
        copies: parameters of that model that PEFT stored beside the adapter, by our names.
    """

    path: Path
    config: ModelConfig
    adapters: Mapping[str, Part]
    base: str
    fingerprint: str | None
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    def check_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Check that a model is the one that the adapter was trained on.

        Args:
            tensors: its parameters by name.

        Raises:
            InputError: another fingerprint, or another weight than the copy in the folder.
        """
        fix = f"open the model that it was trained on{f', {self.base}' if self.base else ''}"
        found = None if self.fingerprint is None else fingerprint(tensors)
        if found is not None and found != self.fingerprint:
            found, expected = f"fingerprint {found[:16]}", str(self.fingerprint)[:16]
            what = "the adapter was trained on another base model"
            raise InputError(what, where=self.path, found=found, expected=expected, fix=fix)
        for name, copy in self.copies.items():
            if not torch.equal(tensors[name].to(copy.dtype), copy):
                what = "the adapter was trained on a base model with another weight"
                raise InputError(what, where=f"{self.path}, {name}", fix=fix)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of parameters: names, shapes and float32 values, whatever type and format they are stored in."""
    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def read(folder: str | os.PathLike[str], config: ModelConfig) -> AdapterFile:
    """Read an adapter folder.

    Embedding and head that are stored whole may have more rows than the base's; a scalar head, that of a reward model,
    takes the place of the base's head.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        config: the shape of the base model.

    Raises:
        InputError: a file is missing or damaged; a setting that is not supported; tensors that are missing, unknown or
            of another shape than the settings and the base model ask for; an adapter of a tied embedding or head.
    """
    refuse_remote(folder)
    folder = Path(folder)
    settings, path = read_config(folder / CONFIG), folder / WEIGHTS
    if SCORE in settings.modules_to_save and config.head == "lm":
        own = ModelConfig.load(folder) if (folder / "config.json").exists() else config
        config = replace(config, head="score", pad_id=own.pad_id)
    if not path.exists():
        raise InputError("no weights in the adapter folder", where=folder, expected=WEIGHTS)
    data, header = DataFile.of(path), read_header(path)
    refuse_integers(header, path)
    stored = {key: item.shape for key, item in header.items()}
    config = _grown(config, settings, stored)
    sites = _sites(config, settings)
    expected = {key: shape for keys in sites.values() for key, shape in keys.items()}
    copies = {key: name for key, name in _copies(config).items() if key in stored and key not in expected}
    _check(expected, {key: shape for key, shape in stored.items() if key not in copies}, path)
    tensors: dict[str, Tensor] = {key: data.floats(item) for key, item in header.items()}
    metadata = read_metadata(path)
    adapters = {name: _part(settings, _names(config)[name], [tensors[key] for key in sites[name]]) for name in sites}
    for name, entry in peft_fused.fused_layers(config).items():
        if isinstance(fused := adapters.pop(name, None), Adapter):
            adapters |= peft_fused.split(entry, fused, _columns(metadata, name, path))
    base, sha = settings.base_model_name_or_path, metadata.get(FINGERPRINT)
    return AdapterFile(folder, config, adapters, base, sha, {name: tensors[key] for key, name in copies.items()})


def _columns(metadata: Mapping[str, str], name: str, path: Path) -> dict[str, tuple[int, int]]:
    """Columns of a fused layer's B that belong to each of its parts, as `write` noted them."""
    try:
        table = json.loads(metadata.get(COLUMNS, "{}")).get(name, {})
        return {str(key): (int(start), int(end)) for key, (start, end) in table.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError("the table of fused layers is damaged", where=f"{path}, metadata, {COLUMNS}") from None


def _grown(config: ModelConfig, settings: PeftConfig, stored: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Shape with the rows of an embedding and a head that are both stored whole, where they have more."""
    names = _names(config)
    whole = [n for n in (EMBEDDING, HEAD) if any(named(module, [n]) for module in settings.modules_to_save)]
    rows = {stored.get(f"{PREFIX}{names[name]}.weight", (0,))[0] for name in whole}
    grows = len(whole) == 2 and len(rows) == 1 and max(rows) > config.vocab_size
    return replace(config, vocab_size=max(rows)) if grows else config


def _sites(config: ModelConfig, settings: PeftConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Our name of each adapted layer -> keys and shapes of its tensors: A, B and magnitude, or the whole weight."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    names, shapes = _names(config), matrices(config)
    shapes |= {name: (e.shape[0], e.shape[1]) for name, e in peft_fused.fused_layers(config).items()}
    for module in settings.modules_to_save:
        if module == "classifier" and SCORE in names:
            continue  # which PEFT names beside the score, for other architectures
        ends = named(module, (EMBEDDING, SCORE if SCORE in names else HEAD))
        if not ends:
            where, expected = f"{settings.where}, modules_to_save", "embed_tokens, lm_head"
            raise InputError("this module is not supported", where=where, found=module, expected=expected)
        refuse_tied(config, ends, f"{settings.where}, modules_to_save")
        found |= {name: {f"{PREFIX}{names[name]}.weight": shapes[name]} for name in ends}
    for name, theirs in names.items():
        if name in found or not settings.targets(theirs, name not in (EMBEDDING, HEAD, SCORE)):
            continue
        refuse_tied(config, [name], f"{settings.where}, target_modules")
        outputs, inputs = shapes[name][::-1] if name == EMBEDDING else shapes[name]
        rank = settings.rank(theirs)
        wanted = zip(_keys(theirs, name), ((rank, inputs), (outputs, rank), (outputs,)), strict=True)
        found[name] = dict(list(wanted)[: 3 if settings.use_dora else 2])
    return found


def _part(settings: PeftConfig, theirs: str, tensors: list[Tensor]) -> Part:
    if len(tensors) == 1:
        return FullWeight(tensors[0])
    a, b, magnitude = (*tensors, None)[:3]
    assert a is not None and b is not None
    return Adapter(a, b, settings.alpha(theirs), magnitude, settings.use_rslora, settings.lora_dropout)


def _names(config: ModelConfig) -> dict[str, str]:
    """Our name -> name in transformers of every layer that is one there as well; and those that are fused there."""
    table = layout(config, hf.NAMES.get(config.to_hf()["model_type"], {}))
    known = {f"{HEAD}.weight": f"{HEAD}.weight"}  # which a tied one has there too
    known |= {name: theirs for theirs, entry in table.items() if len(entry.ours) == 1 for name in entry.ours}
    names = [name for name in matrices(config) if f"{name}.weight" in known]
    fused = {name: name for name in peft_fused.fused_layers(config)}
    return {name: known[f"{name}.weight"].removesuffix(".weight") for name in names} | fused


def _keys(theirs: str, name: str) -> tuple[str, str, str]:
    """Keys of A, B and the magnitude of a layer."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if name == EMBEDDING else ("lora_A.weight", "lora_B.weight")
    return f"{PREFIX}{theirs}.{a}", f"{PREFIX}{theirs}.{b}", f"{PREFIX}{theirs}.lora_magnitude_vector"


def _copies(config: ModelConfig) -> dict[str, str]:
    """Key -> our parameter, of base weights that PEFT stores beside an adapter of the embedding or the head."""
    found: dict[str, str] = {}
    for name, theirs in _names(config).items():
        if name in (EMBEDDING, HEAD):
            ours = f"{EMBEDDING if config.tie_embeddings else name}.weight"
            found |= {f"{PREFIX}{theirs}.{end}": ours for end in ("base_layer.weight", "weight")}
    return found


def _check(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuse tensors other than those expected."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        listed = (("missing", missing), ("unknown", unknown))
        raise InputError(
            f"the tensors are not those that {CONFIG} and the base model ask for",
            where=path,
            found="; ".join(f"{len(keys)} {word}: {', '.join(keys[:6])}" for word, keys in listed if keys),
            expected=f"{len(expected)} tensors",
        )
    for key, shape in expected.items():
        if found[key] != shape:
            what = "a tensor has another shape than rank and base model ask for"
            raise InputError(what, where=f"{path}, {key}", found=found[key], expected=shape)


def write(
    folder: Path, config: ModelConfig, adapters: Mapping[str, Part], base: str = "", sha: str | None = None
) -> None:
    """Write an adapter folder.

    Args:
        folder: made if need be; other files in it stay.
        config: the shape of the base model.
        adapters: by our names of the layers.
        base: name or path of the base model.
        sha: its `fingerprint`, which `read` gives back; it is kept in the metadata of the weights.

    Raises:
        InputError: a layer that is a part of another one in transformers; low-rank updates with unequal settings.
    """
    check_sites(config, adapters)
    names, tensors = _names(config), dict[str, Tensor]()
    updates = {name: part for name, part in adapters.items() if isinstance(part, Adapter)}
    adapters, columns = dict(adapters), dict[str, Any]()
    for name, entry in peft_fused.fused_layers(config).items():
        if inside := [layer for layer in peft_fused.parts_of(entry) if layer in updates]:
            adapters[name], columns[name] = peft_fused.join(name, entry, updates)
            for layer in inside:
                del adapters[layer]
    for name, part in adapters.items():
        if isinstance(part, FullWeight):
            tensors[f"{PREFIX}{names[name]}.weight"] = part.weight
        else:
            factors = part.lora_A, part.lora_B, part.magnitude
            pairs = zip(_keys(names[name], name), factors, strict=True)
            tensors |= {key: factor for key, factor in pairs if factor is not None}
    values = _settings(config, adapters, base)
    stored = {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({FINGERPRINT: sha} if sha else {})
    metadata |= {COLUMNS: json.dumps(columns)} if columns else {}
    replace_file(folder / WEIGHTS, lambda path: save_file(stored, path, metadata))
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    replace_text(folder / CONFIG, text)


def check_sites(config: ModelConfig, sites: Iterable[str]) -> None:
    """Check that an adapter of these layers can be written.

    Raises:
        InputError: a layer that is a part of another one in transformers.
    """
    known = {
        *_names(config),
        *(name for e in peft_fused.fused_layers(config).values() for name in peft_fused.parts_of(e)),
    }
    parts = [name for name in sites if name not in known]
    if parts:
        what = "this layer is a part of a fused one in transformers, which an adapter of its own does not fit"
        raise InputError(what, where=parts[0], fix="leave it out of the targets")


def _settings(config: ModelConfig, adapters: Mapping[str, Part], base: str) -> dict[str, Any]:
    """Values of adapter_config.json."""
    names = _names(config)
    updates = {names[name]: part for name, part in adapters.items() if isinstance(part, Adapter)}
    kinds = {(part.use_rslora, part.magnitude is not None, part.dropout) for part in updates.values()}
    if len(kinds) != 1:
        what = "low-rank updates whose settings differ, or none, cannot be written as one adapter"
        raise InputError(what, found=", ".join(map(str, sorted(kinds))) or "no update", expected="one setting for all")
    rslora, dora, dropout = kinds.pop()
    ranks = {name: part.rank for name, part in updates.items()}
    alphas = {name: int(a) if (a := part.alpha) == int(a) else a for name, part in updates.items()}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    ends = sorted({name.rpartition(".")[2] for name in updates})
    chosen = {name for end in ends for name in named(end, names.values())}
    whole = sorted(name.rpartition(".")[2] for name, part in adapters.items() if isinstance(part, FullWeight))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.head == "lm" else "SEQ_CLS",
        "peft_version": VERSION,
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": ends if chosen == set(updates) else sorted(updates),
        "modules_to_save": whole or None,
        "rank_pattern": {name: found for name, found in ranks.items() if found != rank},
        "alpha_pattern": {name: found for name, found in alphas.items() if found != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def with_files(opened: ModelFile, folder: Path) -> ModelFile:
    """Model with the tokenizer and the stop tokens of an adapter folder, where it has them."""
    tokenizer = folder if any((folder / name).exists() for name in hf.TOKENIZERS) else opened.tokenizer
    stops = generation_config.stop_ids(folder) or opened.stop_ids
    sampling = generation_config.defaults(folder) or opened.sampling
    return replace(opened, tokenizer=tokenizer, stop_ids=stops, sampling=sampling)


@torch.no_grad()
def merged(opened: ModelFile, adapter: AdapterFile) -> ModelFile:
    """Model with an adapter in its weights, each computed in float32 when it is read, and not cast.

    Quantized weights of the file are dequantized first. A tokenizer and stop tokens beside the adapter are taken over.

    Raises:
        InputError: the adapter was trained on another model.
    """
    adapter.check_base(opened.tensors)
    parts = {f"{name}.weight": part for name, part in adapter.adapters.items()}
    names = adapter.config.tensors()
    tensors = LazyTensors(names, lambda name: _merged(opened.tensors, name, parts.get(name)))
    int4 = {name: matrix for name, matrix in opened.int4.items() if name not in parts}
    made = replace(opened, config=adapter.config, tensors=tensors, int4=int4)
    return with_files(made, adapter.path)


@torch.no_grad()
def _merged(tensors: Mapping[str, Tensor], name: str, part: Part | None) -> Tensor:
    if isinstance(part, FullWeight):
        return part.weight.detach()
    weight = tensors[name]
    if part is None:
        return weight
    return part.merged(weight.T).T if name == f"{EMBEDDING}.weight" else part.merged(weight)
