"""A small MRPC, and a small BERT that fits it."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

TINY = Path(__file__).parent / "data" / "bert-cls-tiny"


def write_data(folder):
    """Pairs in Microsoft's format, of which those with equal texts are equivalent."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, rows in (("train", 20), ("test", 12)):
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        for row in range(rows):
            first, second = (
                " ".join(f"w{i}" for i in rng.integers(0, 30, 4)) for _ in range(2)
            )
            texts = f"{first}\t{first if row % 2 else second}"
            lines.append(f"{row % 2}\t{row}\t{row}\t{texts}")
        text = "\ufeff" + "".join(line + "\r\n" for line in lines)
        (folder / f"mrpc_{split}.tsv").write_bytes(text.encode())
    return folder


def write_model(folder):
    """A base checkpoint with its vocabulary, but without a head."""
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {n: x for n, x in tensors.items() if not n.startswith("classifier")}
    save_file(kept, folder / "model.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{i}" for i in range(160 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder
