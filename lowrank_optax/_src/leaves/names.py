"""What the names of a path say of a leaf: the words that models of JAX use.

The tables are read by the default rule alone, see `default_matrices`.
"""

import re

from lowrank_optax._src.leaves.paths import Path, words

# The last word of a leaf's name, or of its module's: there is one such vector a layer,
# so that two axes are a stack, or split heads.
VECTORS = frozenset("bias biases scale gain gamma beta offset".split())

_BIASES = frozenset("bias biases".split())

# As the others; and anywhere in both names, of a leaf that ends in one of `WEIGHTS`.
NORMS = frozenset("norm norms rms ln bn".split())

_ENDS_OF_NORMS = ("norm", "normalization")

WEIGHTS = frozenset("weight w".split())

# A word anywhere in a path: tables that are looked up, and weights tied to them.
EMBEDDINGS = frozenset(
    "emb embs embd posemb unembed unembedding wte wpe vocab vocabulary table".split()
)

_START_OF_EMBEDDINGS = "embed"

_POSITIONS = frozenset("pos position positional positions".split())
_ENCODINGS = frozenset("encoding encodings enc".split())

# A word anywhere in a path: what is read out.
HEADS = frozenset("logits classifier pooler readout predictions".split())

# A whole part of a path, and one that is the leaf or its module.
HEAD_PARTS = frozenset("qa_outputs".split())

HEAD_MODULES = frozenset(
    "score shared output output_layer output_projection lm_out lm_output".split()
)

_ATTENTION = frozenset("att attn attention selfattention crossattention mha".split())


def pieces(parts: Path) -> Path:
    """Parts of a path, split where one holds several, as of Keras and Haiku."""
    return tuple(p for part in parts for p in re.split(r"[./]", part) if p)


def named_dense(path: Path) -> str | None:
    """The reason why the default rule keeps a leaf at full rank, by its pieces."""
    for piece in path[-2:]:
        if _is_vector(piece):
            return f"'{piece}' names a bias or a norm"
    if path and not _BIASES.isdisjoint(words(path[-1])[:1]):  # of a gate: `bias_ih`
        return f"'{path[-1]}' names a bias"
    if path and not WEIGHTS.isdisjoint(words(path[-1])[-1:]):
        for piece in path[-2:]:
            if any(map(_is_norm, words(piece))):
                return f"'{piece}' names a norm"
    attends = False
    for i, piece in enumerate(path):
        own = words(piece)
        if any(map(_is_embedding, own)) or not (
            _POSITIONS.isdisjoint(own) or _ENCODINGS.isdisjoint(own)
        ):
            return f"'{piece}' names an embedding or a head"
        attends = attends or not _ATTENTION.isdisjoint(own)
        if _is_head(piece.lower(), own, last=i >= len(path) - 2, attends=attends):
            return f"'{piece}' names a head"
    return None


def weights_of(path: Path) -> list[Path]:
    """Where the weights may stand whose bias is at ``path``."""
    *module, name = path or ("",)
    changed = (re.sub(r"^b", "w", name), re.sub(r"_b$", "_w", name))
    return [(*module, other) for other in changed if other != name]


def _is_vector(piece: str) -> bool:
    # A letter alone tells parts apart, as in `ln_f` and `bias_k`.
    own = [word for word in words(piece) if len(word) > 1]
    return bool(own) and (own[-1] in VECTORS or _is_norm(own[-1]))


def _is_embedding(word: str) -> bool:
    return word in EMBEDDINGS or word.startswith(_START_OF_EMBEDDINGS)


def _is_norm(word: str) -> bool:
    return word in NORMS or word.endswith(_ENDS_OF_NORMS)


def _is_head(piece: str, own: list[str], last: bool, attends: bool) -> bool:
    if any(word in HEADS for word in own) or piece in HEAD_PARTS:
        return True
    if own[:2] == ["lm", "head"]:  # whatever follows
        return True
    if attends:  # its heads and its output are those of the attention
        return False
    # An `output` that holds further modules is a block's output, not the head.
    return own[-1:] in (["head"], ["heads"]) or (last and piece in HEAD_MODULES)
