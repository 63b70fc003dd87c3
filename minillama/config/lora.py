"""Low-rank adaptation settings, and the layers that they choose. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from minillama.config.loader import nearest
from minillama.config.model import ModelConfig
from minillama.errors import InputError

ALL_LINEAR = "all-linear"
EMBEDDING, HEAD, SCORE = "model.embed_tokens", "lm_head", "score"


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation (LoRA; Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = field(default=8, metadata={"min": 1})
    """Rank r of the update B A of a weight."""
    alpha: float = field(default=16.0, metadata={"above": 0})
    """Scale of the update: alpha / rank, or alpha / sqrt(rank) with use_rslora."""
    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})
    """Dropout of the adapters' inputs."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Layers by name or the end of one, as q_proj or layers.0.mlp.up_proj; all-linear: the linear layers of all blocks.
    embed_tokens and lm_head can be named as well."""
    use_rslora: bool = False
    """Rank-stabilized scale alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed adaptation, a trained magnitude per output (Liu et al. 2024, arXiv 2402.09353)."""
    modules_to_save: tuple[str, ...] = ()
    """embed_tokens, lm_head: trained whole instead, in a copy that is saved with the adapter."""

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def sites(self, model: ModelConfig) -> dict[str, tuple[int, int]]:
        """Name -> shape of every weight with a low-rank update; of a linear layer (out, in), of the embedding (V, D).

        Raises:
            InputError: no target, one that names no layer, or one that is trained whole; a tied embedding or head;
                dropout with the head, whose loss is computed from the updated weight.
        """
        layers = matrices(model)
        ends = {EMBEDDING, HEAD, SCORE}
        if not self.targets:
            raise InputError("an adapter has at least one target", where="targets", expected=ALL_LINEAR)
        found: set[str] = set()
        for target in self.targets:
            names = set(layers) - ends if target == ALL_LINEAR else set(named(target, layers))
            if not names:
                raise unknown("targets", target, layers)
            found |= names
        refuse_tied(model, sorted(found & ends), "targets")
        whole = set(self.whole(model))
        if found & whole:
            what = "a layer is trained either whole or by a low-rank update"
            raise InputError(what, where="modules_to_save", found=", ".join(sorted(found & whole)))
        if HEAD in found and self.dropout:
            what = "dropout does not apply to a low-rank update of the head"
            fix = "leave lm_head out of the targets, or train it whole with modules_to_save"
            raise InputError(what, where="dropout", found=self.dropout, expected=0, fix=fix)
        return {name: layers[name] for name in layers if name in found}

    def whole(self, model: ModelConfig) -> dict[str, tuple[int, int]]:
        """Name -> shape (V, D) of every weight that is trained whole; a scalar head (1, D) always is.

        Raises:
            InputError: another layer than embedding and head, or those of a model that ties them.
        """
        found: dict[str, tuple[int, int]] = {}
        ends = (EMBEDDING, HEAD) if model.head == "lm" else (EMBEDDING,)
        for module in self.modules_to_save:
            names = named(module, ends)
            if not names:
                raise unknown("modules_to_save", module, ends)
            refuse_tied(model, names, "modules_to_save")
            found |= dict.fromkeys(names, (model.vocab_size, model.dim))
        return found | ({SCORE: (1, model.dim)} if model.head == "score" else {})

    def num_params(self, model: ModelConfig) -> int:
        """Trained parameters: r (in + out) per layer, with DoRA out more, and those of the layers trained whole."""
        shapes = self.sites(model)
        updates = sum(self.rank * sum(shape) for shape in shapes.values())
        outputs = sum(shape[1] if name == EMBEDDING else shape[0] for name, shape in shapes.items())
        return updates + outputs * self.use_dora + sum(map(math.prod, self.whole(model).values()))


def matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name -> shape of every layer that can have an adapter: linear layers (out, in); embedding and head (V, D)."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in model.tensors().items() if len(shape) == 2}
    ends = dict.fromkeys((EMBEDDING, HEAD), (model.vocab_size, model.dim))
    if model.head == "score":
        ends = {EMBEDDING: ends[EMBEDDING], SCORE: (1, model.dim)}
    return ends | {name: (shape[0], shape[1]) for name, shape in shapes.items() if name.startswith("model.layers.")}


def named(target: str, names: Iterable[str]) -> list[str]:
    """Names that are the target or end with it, at a dot."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def refuse_tied(model: ModelConfig, names: Iterable[str], where: str) -> None:
    """Refuse an adapter of a tied embedding or head: it would change one of the two, and merged into the weight both.

    Raises:
        InputError: a name among these, and the model ties them.
    """
    for name in names:
        if model.tie_embeddings and name in (EMBEDDING, HEAD):
            what, fix = "embedding and head are one weight in this model", "leave it out"
            raise InputError(what, where=where, found=name, expected="a model that does not tie them", fix=fix)


def unknown(where: str, found: str, names: Iterable[str]) -> InputError:
    """Error of a name that no layer has."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    near = nearest(found, ends)
    fix = f"did you mean {near!r}?" if near else None
    return InputError("no layer has such a name", where=where, found=found, expected=", ".join(ends), fix=fix)
